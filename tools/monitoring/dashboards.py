"""`python -m monitoring.dashboards`: the chart's Grafana dashboards, from what each panel draws."""

import json
from pathlib import Path

from monitoring.grafana import Dashboard, Draw, panel, render, row

FOLDER = Path(__file__).parents[2] / "charts" / "diffusion-opd" / "files" / "dashboards"

_JOB = 'job="$job"'  # the operator
_OBJECT = 'namespace="$namespace",name="$name"'  # one distillation
_CHOOSE_OBJECT = (
    ("namespace", "label_values(opd_info, namespace)"),
    ("name", 'label_values(opd_info{namespace="$namespace"}, name)'),
)


def own(series: str, legend: str) -> Draw:
    return f"{series}{{{_OBJECT}}}", legend


def rate(counter: str, legend: str, by: str = "", of: str = _OBJECT) -> Draw:
    return f"sum{_by(by)} (rate({counter}{{{of}}}[$__rate_interval]))", legend


def train(series: str, legend: str, by: str = "") -> Draw:
    """Every node of a run tells the same, about all ranks."""
    return f"max{_by(by)} (opd_train_{series}{{{_OBJECT}}})", legend


def policy(figure: str) -> Draw:
    """Of the teachers that are trained, by name."""
    return f'max by (task) (opd_train_policy{{{_OBJECT},figure="{figure}"}})', "{{task}}"


def train_rate(counter: str, legend: str, by: str = "") -> Draw:
    return f"max{_by(by)} (rate(opd_train_{counter}{{{_OBJECT}}}[$__rate_interval]))", legend


def ratio(above: str, below: str, legend: str) -> Draw:
    return f"{rate(above, '')[0]} / {rate(below, '')[0]}", legend


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def quantiles(histogram: str, of: str = _OBJECT) -> list[Draw]:
    buckets = rate(f"{histogram}_bucket", "", "le", of)[0]
    return [(f"histogram_quantile({q}, {buckets})", f"p{q * 100:.0f}") for q in (0.5, 0.9, 0.99)]


_PHASES = "opd_train_phase_seconds_total"
_TEACHER_WAIT = rate(_PHASES, "", of=f'{_OBJECT},phase="teacher_wait"')[0]

TRAINING = Dashboard(
    "training",
    "Diffusion OPD / Training",
    _CHOOSE_OBJECT,
    [
        row(
            "Run",
            panel("Phase", own("opd_info", "{{phase}}"), kind="stat", named=True),
            panel("Progress", own("opd_progress_ratio", "rounds"), unit="percentunit", kind="gauge"),
            panel("Checkpoint", own("opd_checkpoint_round", "round"), kind="stat"),
            panel("Starts again", own("opd_restarts", "{{cause}}"), kind="stat"),
            panel("Finished stages", own("opd_stage_duration_seconds", "{{stage}}"), unit="s", kind="bargauge"),
        ),
        row(
            "Learning",
            panel("Loss", train("loss", "{{task}}", "task"), logarithmic=True),
            panel("Velocity error", train("velocity_mse", "{{task}}", "task"), logarithmic=True),
            panel("KL", train("kl", "{{task}}", "task"), logarithmic=True),
            panel("Reward of the validation", train("reward", "{{task}} {{reward}}", "task, reward")),
        ),
        row(
            "",
            panel("Loss by solver step", train("step_loss", "{{task}} {{step}}", "task, step"), logarithmic=True),
            panel("KL by solver step", train("step_kl", "{{task}} {{step}}", "task, step"), logarithmic=True),
            panel("Gradient norm", train("grad_norm", "before clipping")),
            panel("Learning rate", train("learning_rate", "rate"), unit="sci"),
        ),
        row(
            "Teachers in training",
            panel("Reward of the images", policy("reward")),
            panel("Deviation among the images of a prompt", policy("group_std")),
            panel("Prompts without any", policy("flat_groups"), unit="percentunit"),
            panel("Policy ratios that were clipped", policy("clipped"), unit="percentunit"),
        ),
        row(
            "Evaluation",
            panel("Mean reward", own("opd_eval_score", "{{task}} {{reward}} {{model}}"), kind="bargauge"),
            panel("Gain kept", own("opd_eval_kept_ratio", "{{task}} {{reward}}"), unit="percentunit", kind="bargauge"),
        ),
        row(
            "Speed",
            panel("Images per second", train("images_per_second", "images/s")),
            panel(
                "Where the time goes",
                train_rate("phase_seconds_total", "{{phase}}", "phase"),
                unit="percentunit",
                stacked=True,
            ),
            panel(
                "Rounds since the checkpoint",
                (f"{train('round', '')[0]} - {train('checkpoint_round', '')[0]}", "rounds"),
            ),
        ),
        row(
            "Teacher servers",
            panel(
                "Waiting for teachers",
                (f"{_TEACHER_WAIT} / {rate(_PHASES, '')[0]}", "of the time"),
                unit="percentunit",
            ),
            panel(
                "Requests of the trainer",
                train_rate("teacher_requests_total", "requests/s"),
                train_rate("teacher_retries_total", "repeated/s"),
            ),
            panel("Rows per second", rate("nv_inference_count", "{{pod}}", "pod")),
            panel("Rows in a batch", ratio("nv_inference_count", "nv_inference_exec_count", "mean")),
            panel(
                "Time in Triton's queue",
                ratio("nv_inference_queue_duration_us", "nv_inference_request_success", "mean"),
                unit="µs",
            ),
            panel("Failed requests", rate("nv_inference_request_failure", "{{reason}}", "reason")),
        ),
        row(
            "",
            panel("LoRAs in memory", own("opd_teacher_adapters", "{{pod}}")),
            panel("LoRAs loaded", rate("opd_teacher_adapter_loads_total", "{{pod}}/s", "pod")),
            panel(
                "LoRAs dropped in a batch", ratio("opd_teacher_adapter_drops_total", "nv_inference_exec_count", "mean")
            ),
        ),
    ],
)

SERVING = Dashboard(
    "serving",
    "Diffusion OPD / Serving",
    _CHOOSE_OBJECT,
    [
        row(
            "Requests",
            panel("Requests per second", rate("opd_endpoint_requests_total", "{{code}}", "code")),
            panel("Time of a request", *quantiles("opd_endpoint_request_duration_seconds"), unit="s"),
            panel("Time in the queue", *quantiles("opd_endpoint_queue_duration_seconds"), unit="s"),
        ),
        row(
            "",
            panel("Not admitted", rate("opd_endpoint_rejected_total", "{{reason}}", "reason")),
            panel("Given up", rate("opd_endpoint_cancelled_total", "{{reason}}", "reason")),
            panel("Failed inside", rate("opd_endpoint_failures_total", "{{stage}}", "stage")),
        ),
        row(
            "Engine",
            panel("Images per second", rate("opd_endpoint_images_total", "{{pod}}", "pod")),
            panel("Images in a tick", ratio("opd_endpoint_batch_size_sum", "opd_endpoint_batch_size_count", "mean")),
            panel("Time of a tick", *quantiles("opd_endpoint_step_duration_seconds"), unit="s"),
        ),
        row(
            "Load",
            panel("Images that wait", own("opd_endpoint_queue_depth", "{{pod}}")),
            panel("Images at work", own("opd_endpoint_active_samples", "{{pod}}")),
            panel("Work that is left", own("opd_endpoint_backlog_pixel_steps", "{{pod}}")),
            panel("GPU memory", own("opd_endpoint_gpu_memory_bytes", "{{pod}} {{kind}}"), unit="bytes"),
        ),
        row(
            "Rollout",
            panel(
                "Pods by student",
                (f"count by (version) (opd_endpoint_model_info{{{_OBJECT}}})", "{{version}}"),
                stacked=True,
            ),
            panel("Traffic to a new student", own("opd_canary_traffic_ratio", "share"), unit="percentunit"),
            panel(
                "Conditions",
                (f'opd_condition{{{_OBJECT},type=~"Deployed|Serving|Ready"}}', "{{type}} {{status}} {{reason}}"),
            ),
        ),
    ],
)

OPERATOR = Dashboard(
    "operator",
    "Diffusion OPD / Operator",
    [("job", "label_values(opd_leader, job)")],
    [
        row(
            "Distillations",
            panel("By phase", (f"count by (phase) (opd_info{{{_JOB}}})", "{{phase}}"), stacked=True),
            panel(
                "Conditions that are not met",
                (f'count by (type, reason) (opd_condition{{{_JOB},status="False"}})', "{{type}} {{reason}}"),
            ),
            panel(
                "Failed",
                (f'opd_condition{{{_JOB},type="Failed",status="True"}}', "{{namespace}}/{{name}} {{reason}}"),
            ),
        ),
        row(
            "Reconciliation",
            panel("Results", rate("controller_runtime_reconcile_total", "{{result}}/s", "result", _JOB)),
            panel("Time", *quantiles("controller_runtime_reconcile_time_seconds", _JOB), unit="s"),
            panel("Queue", (f"workqueue_depth{{{_JOB}}}", "{{pod}}")),
            panel(
                "Time in the queue",
                *quantiles("workqueue_queue_duration_seconds", _JOB),
                (f"workqueue_oldest_seconds{{{_JOB}}}", "oldest now"),
                unit="s",
            ),
        ),
        row(
            "API server",
            panel("Requests", rate("opd_api_requests_total", "{{verb}} {{resource}}", "verb, resource", _JOB)),
            panel("Answers", rate("opd_api_requests_total", "{{code}}/s", "code", _JOB)),
            panel("Time of a request", *quantiles("opd_api_request_duration_seconds", _JOB), unit="s"),
            panel("What the watches missed", (f"increase(opd_resync_news_total{{{_JOB}}}[1h])", "objects in an hour")),
        ),
        row(
            "Process",
            panel("Leader", (f"opd_leader{{{_JOB}}}", "{{pod}}")),
            panel("Version", (f"opd_build_info{{{_JOB}}}", "{{pod}} {{version}}")),
            panel("Memory", (f"process_resident_memory_bytes{{{_JOB}}}", "{{pod}}"), unit="bytes"),
            panel("CPU", rate("process_cpu_seconds_total", "{{pod}}", "pod", _JOB)),
        ),
    ],
)

DASHBOARDS = (TRAINING, SERVING, OPERATOR)


def queries() -> list[tuple[str, str, str]]:
    """(dashboard / panel, query, legend) of all dashboards."""
    return [
        (f"{board.title} / {panel.title}", query, legend)
        for board in DASHBOARDS
        for _, panels in board.rows
        for panel in panels
        for query, legend in panel.draws
    ]


def text(dashboard: Dashboard) -> str:
    return json.dumps(render(dashboard), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for each in DASHBOARDS:
        (FOLDER / f"{each.name}.json").write_text(text(each))
