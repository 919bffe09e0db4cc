"""Specs that must be refused: by `opd validate` and by the API server, in the same words where a rule is ours."""

import copy


def changed(content, path, value):
    """A copy with the field at `path` set, or removed where `value` is REMOVE."""
    content = copy.deepcopy(content)
    *parents, last = path
    place = content
    for part in parents:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
    if value is REMOVE:
        del place[last]
    else:
        place[last] = value
    return content


REMOVE = object()
S, T, E = ("spec",), ("spec", "training"), ("spec", "evaluation")
FIRST = ("spec", "teachers", 0)
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
SDE = {"type": "SDE", "steps": 6, "noiseLevel": 0.7}
NFT = {"algorithm": "DiffusionNFT", "rounds": 9}
COSINE = {"schedule": "Cosine", "warmupRounds": 9}
WEIGHTS = "spec.teachers[0].training.rewardWeights"


def trained(**settings):
    """A teacher that is trained, with its own prompts and rewards."""
    task = {"name": "geneval", "prompts": {"uri": "pvc://tiny-world/prompts"}, "rewards": ["geneval"]}
    return {**task, "training": {**NFT, **settings}}


def learning(**settings):
    """The training of a student that learns from rewards."""
    return {"rounds": 9, "method": "RL", "reinforcement": {"algorithm": "DiffusionNFT", **settings}}


def whole(**parts):
    """A spec whose second teacher has a model of its own."""
    task = {"prompts": {"uri": "pvc://tiny-world/prompts"}, "rewards": ["geneval"]}
    lora = {"name": "lora", "adapter": {"uri": "pvc://tiny-world/teachers/ocr"}, **task}
    return {
        "model": {"uri": "pvc://tiny-world/base"},
        "student": {"output": {"uri": "pvc://students/x"}},
        "teachers": [lora, {"name": "whole", "model": {"uri": "pvc://models/ocr"}, **task}],
        "training": {"rounds": 1},
        **parts,
    }


def alone(gate=None, student=None, training=None):
    """A spec whose tasks have no teacher, for a student that learns from rewards."""
    task = {"prompts": {"uri": "pvc://tiny-world/prompts"}, "rewards": ["geneval"]}
    return {
        "model": {"uri": "pvc://tiny-world/base"},
        "student": {"output": {"uri": "pvc://students/x"}, **(student or {})},
        "teachers": [{"name": "geneval", **task}, {"name": "other", **task}],
        "training": training or learning(),
        "evaluation": {"gate": [{"task": "geneval", "reward": "geneval", **(gate or {"atLeast": 0.5})}]},
    }


# (where it is changed, to what, path that the problem names, words of message or remedy)
CASES = [
    (("apiVersion",), "opd.dev/v1", "apiVersion", "write opd.dev/v1alpha1"),
    (("apiVersion",), REMOVE, "apiVersion", "is required"),
    (("kind",), "Distillation", "kind", "write OPDDistillation"),
    (("metadata", "name"), "Tiny Tasks", "metadata.name", "lower-case letters, digits and -"),
    (("metadata", "name"), "a" * 41, "metadata.name", "a letter first, at most 40"),
    (("metadata", "name"), "2-tasks", "metadata.name", "a letter first"),
    (("metadata", "name"), "tiny.tasks", "metadata.name", "lower-case letters, digits and -"),
    (("spec",), REMOVE, "spec", "is required"),
    ((*S, "teacher"), [], "spec.teacher", "did you mean teachers?"),
    ((*T, "learningRate"), 1e-3, "spec.training.learningRate", "unknown field"),
    ((*T, "optimizer", "learning_rat"), 1e-3, "spec.training.optimizer.learning_rat", "did you mean learningRate?"),
    ((*S, "model", "uri"), "models/base", "spec.model.uri", "pvc://claim/path"),
    ((*S, "model", "uri"), "hf://org/name", "spec.model.uri", "hf://organisation/name@revision"),
    ((*S, "model", "uri"), "pvc://a/../b", "spec.model.uri", "not a URI"),
    ((*S, "model", "uri"), "file:///x/$(reboot)", "spec.model.uri", "not a URI"),
    ((*S, "model", "maxSequenceLength"), 0, "spec.model.maxSequenceLength", "at least 1"),
    ((*S, "student", "output"), REMOVE, "spec.student.output", "is required"),
    ((*S, "student", "output", "uri"), "hf://me/student@main", "spec.student.output.uri", "write pvc://claim/folder"),
    ((*S, "student", "output", "uri"), "pvc://students", "spec.student.output.uri", "write pvc://claim/folder"),
    ((*S, "endpoint", "rollout"), {"maxSurge": 0}, "spec.endpoint.rollout.maxSurge", "replicas: 2 or more"),
    ((*S, "endpoint", "studentDigest"), "sha256:12", "spec.endpoint.studentDigest", "64 hexadecimal digits"),
    ((*S, "student", "initFrom"), "student", "spec.student.initFrom", "not a URI"),
    ((*S, "student"), {"initFrom": "pvc://a/b", "initFromTeachers": True, "output": {"uri": "pvc://students/x"}}, "spec.student.initFromTeachers", "one of the two"),
    (S, whole(student={"initFromTeachers": True, "output": {"uri": "pvc://students/x"}}), "spec.student.initFromTeachers", "task whole has no LoRA"),
    (S, whole(training={"rounds": 1, "objective": {"extrapolation": 1.5}}), "spec.training.objective.extrapolation", "teacher whole has a model of its own"),
    ((*S, "student", "adapter", "rank"), 0, "spec.student.adapter.rank", "at least 1"),
    ((*S, "student", "adapter", "type"), "DoRA", "spec.student.adapter.type", "write 'LoRA'"),
    ((*S, "student", "adapter", "targetModules"), [], "spec.student.adapter.targetModules", "at least 1"),
    ((*S, "student", "adapter", "targetModules"), ["a b"], "spec.student.adapter.targetModules[0]", "e.g. attn.to_q"),
    ((*S, "teachers"), [], "spec.teachers", "at least 1"),
    ((*FIRST, "name"), "ocr", "spec.teachers[1].name", "this name is taken"),
    ((*FIRST, "name"), "GenEval", "spec.teachers[0].name", "lower-case"),
    ((*FIRST, "weight"), -1, "spec.teachers[0].weight", "at least 0"),
    ((*FIRST, "guidanceScale"), -0.5, "spec.teachers[0].guidanceScale", "at least 0"),
    ((*FIRST, "rewards"), [], "spec.teachers[0].rewards", "at least 1"),
    ((*FIRST, "training"), NFT, "spec.teachers[0]", "exactly one of adapter, model and training"),
    ((*FIRST, "model"), {"uri": "pvc://models/ocr"}, "spec.teachers[0]", "exactly one of adapter, model and training"),
    ((*FIRST, "adapter"), {"model": {"uri": "ocr"}}, "spec.teachers[0].adapter.model", "unknown field"),
    (FIRST, trained(rounds=0), "spec.teachers[0].training.rounds", "at least 1"),
    (FIRST, trained(groupSize=1), "spec.teachers[0].training.groupSize", "at least 2"),
    (FIRST, trained(algorithm="PPO"), "spec.teachers[0].training.algorithm", "DiffusionNFT"),
    (FIRST, trained(sampler=SDE), "spec.teachers[0].training.sampler.type", "write type: ODE"),
    (FIRST, trained(algorithm="FlowGRPO", sampler={"steps": 6}), "spec.teachers[0].training.sampler.type", "needs noise"),
    (FIRST, trained(sampler={"noiseLevel": 0.7}), "spec.teachers[0].training.sampler.noiseLevel", "write 0"),
    (FIRST, trained(clipRange=1e-4), "spec.teachers[0].training.clipRange", "clips no ratio"),
    (FIRST, trained(stepsPerImage=10), "spec.teachers[0].training.stepsPerImage", "write 1 to 9"),
    (FIRST, trained(updatesPerRound=5), "spec.teachers[0].training.updatesPerRound", "a divisor of 48"),
    (FIRST, trained(rewardWeights=[{"reward": "ocr", "weight": 1}]), WEIGHTS + "[0].reward", "this teacher has no such reward"),
    (FIRST, trained(rewardWeights=[{"reward": "geneval", "weight": 0}]), WEIGHTS, "a weight above 0"),
    (FIRST, trained(rewardWeights=[{"reward": "geneval", "weight": 1}] * 2), WEIGHTS, "named twice"),
    (FIRST, trained(optimizer=COSINE), "spec.teachers[0].training.optimizer.warmupRounds", "write less than 9"),
    ((*FIRST, "rewards"), ["a", "a"], "spec.teachers[0].rewards", "named twice"),
    ((*FIRST, "rewards"), ["os; rm"], "spec.teachers[0].rewards[0]", "module:function"),
    ((*FIRST, "adapter"), REMOVE, "spec.teachers[0]", "exactly one of adapter, model and training, or training.method: RL"),
    (S, alone(gate={"ofTeacher": 0.9}), "spec.evaluation.gate[0].ofTeacher", "task geneval has no teacher to compare with; write atLeast"),
    (S, alone(student={"initFromTeachers": True}), "spec.student.initFromTeachers", "task geneval has no LoRA"),
    (S, alone(training={"rounds": 9}), "spec.teachers[0]", "only a student that learns from rewards needs none"),
    ((*FIRST, "prompts", "uri"), REMOVE, "spec.teachers[0].prompts.uri", "is required"),
    ((*S, "rewardServers"), [{"reward": "ocr", "urls": ["http://a"]}], "spec.rewardServers[0].reward", "no teacher has"),
    ((*S, "rewardServers"), [{"reward": "tiny-ocr", "urls": ["http://a"]}] * 2, "spec.rewardServers", "name each reward once"),
    ((*S, "rewardServers"), [{"reward": "tiny-ocr", "urls": []}], "spec.rewardServers[0].urls", "at least 1"),
    ((*S, "rewardServers"), [{"reward": "tiny-ocr", "urls": ["rewards:8500"]}], "spec.rewardServers[0].urls[0]", "e.g. http://rewards:8500"),
    ((*S, "rewardServers"), [{"reward": "tiny-ocr", "urls": ["http://a:70000"]}], "spec.rewardServers[0].urls[0]", "not a server's URL"),
    ((*S, "rewardServers"), [{"reward": "tiny-ocr", "urls": ["http://me:secret@a"]}], "spec.rewardServers[0].urls[0]", "not a server's URL"),
    ((*S, "rewardServers"), [{"reward": "tiny-ocr", "urls": ["http://a"], "timeoutSeconds": 0}], "spec.rewardServers[0].timeoutSeconds", "at least 1"),
    ((*S, "teacherServing", "placement"), "Remote", "spec.teacherServing.placement", "'Shared', 'Dedicated' or 'InProcess'"),
    ((*S, "teacherServing", "replicas"), 0, "spec.teacherServing.replicas", "at least 1"),
    ((*T, "rounds"), 0, "spec.training.rounds", "at least 1"),
    ((*T, "rounds"), "many", "spec.training.rounds", "whole number"),
    ((*T, "rounds"), REMOVE, "spec.training.rounds", "is required"),
    ((*T, "resolution", "width"), 36, "spec.training.resolution.width", "write 32 or 40"),
    ((*T, "resolution", "height"), 8, "spec.training.resolution.height", "at least 16"),
    ((*T, "sampler", "type"), "SDF", "spec.training.sampler.type", "'ODE' or 'SDE'"),
    ((*T, "sampler", "solver"), "a b", "spec.training.sampler.solver", "module:function"),
    ((*T, "sampler", "steps"), 0, "spec.training.sampler.steps", "at least 1"),
    ((*T, "sampler", "noiseLevel"), 0.7, "spec.training.sampler.noiseLevel", "type: SDE"),
    ((*T, "sampler"), {"type": "SDE"}, "spec.training.sampler.noiseLevel", "an SDE needs noise"),
    ((*T, "sampler"), {**SDE, "solver": "DPM2"}, "spec.training.sampler.solver", "DPM2 is deterministic"),
    ((*T, "sampler"), {**SDE, "solver": "CPS", "noiseLevel": 2}, "spec.training.sampler.noiseLevel", "at most 1"),
    ((*T, "sampler"), {**SDE, "solver": "DDIM", "noiseLevel": 2}, "spec.training.sampler.noiseLevel", "at most 1"),
    ((*T, "objective", "type"), "KL", "spec.training.objective.type", "deterministic sampler"),
    ((*T, "objective", "type"), "PPO", "spec.training.objective.type", "deterministic sampler"),
    ((*T, "objective", "type"), "a b", "spec.training.objective.type", "module:function"),
    ((*T, "objective"), {"type": "PolicyGradient", "selfNormalized": True}, "spec.training.objective.selfNormalized", "type: KL"),
    ((*T, "objective"), {"type": "PDM", "selfNormalized": True}, "spec.training.objective.selfNormalized", "PDM have no"),
    ((*T, "objective"), {"type": "PDM", "directionWeight": 0}, "spec.training.objective.directionWeight", "more than 0"),
    (T, {"rounds": 9, "method": "SFT", "objective": {"type": "PDM"}}, "spec.training.objective.type", "write method: OPD"),
    (T, learning() | {"objective": {"type": "PDM"}}, "spec.training.objective.type", "ask no teacher"),
    ((*T, "objective"), {"trainedSteps": [0], "stepWeights": [1, 1, 1, 1]}, "spec.training.objective.stepWeights", "write one of them"),
    ((*T, "objective", "stepWeights"), [1], "spec.training.objective.stepWeights", "write 4 numbers"),
    ((*T, "objective", "stepWeights"), [0, 0, 0, 0], "spec.training.objective.stepWeights", "a weight above 0"),
    ((*T, "objective", "stepsPerRound"), 5, "spec.training.objective.stepsPerRound", "write 1 to 4"),
    ((*T, "objective", "extrapolation"), 0, "spec.training.objective.extrapolation", "more than 0"),
    ((*T, "method"), "GAN", "spec.training.method", "'OPD', 'SFT', 'DMD2', 'TDM' or 'RL'"),
    ((*T, "method"), "DMD2", "spec.training.objective.type", "write objective.type: X0"),
    (T, {"rounds": 9, "method": "TDM", "objective": {"type": "X0", "selfNormalized": True}}, "spec.training.objective.selfNormalized", "write selfNormalized: false"),
    ((*T, "fakeScore"), {"updatesPerRound": 2}, "spec.training.fakeScore", "write method: DMD2"),
    ((*T, "fakeScore"), {"updatesPerRound": 0}, "spec.training.fakeScore.updatesPerRound", "at least 1"),
    ((*T, "method"), "RL", "spec.training.reinforcement", "write both"),
    ((*T, "reinforcement"), {"algorithm": "DiffusionNFT"}, "spec.training.reinforcement", "leave reinforcement out"),
    (T, learning(roundsPerTurn=0), "spec.training.reinforcement.roundsPerTurn", "at least 1"),
    (T, learning(algorithm="GRPOGuard"), "spec.training.sampler.type", "needs noise"),
    (T, {**learning(), "sampler": SDE}, "spec.training.sampler.type", "write type: ODE"),
    (T, learning(clipRange=1e-4), "spec.training.reinforcement.clipRange", "clips no ratio"),
    (T, learning(stepsPerImage=10), "spec.training.reinforcement.stepsPerImage", "write 1 to 9"),
    (T, learning(updatesPerRound=5), "spec.training.reinforcement.updatesPerRound", "a divisor of 48"),
    (T, {**learning(groupSize=5, promptsPerRound=1), "nodes": 2}, "spec.training.reinforcement.groupSize", "multiple of 2"),
    (T, learning(rewardWeights=[{"reward": "other", "weight": 1}]), "spec.training.reinforcement.rewardWeights[0].reward", "name one of a teacher's"),
    (T, learning(rewardWeights=[{"reward": "tiny-ocr", "weight": 1}] * 2), "spec.training.reinforcement.rewardWeights", "name each reward once"),
    (T, learning(rewardWeights=[{"reward": "tiny-ocr", "weight": 0}]), "spec.training.reinforcement.rewardWeights", "give every task a reward"),
    ((*T, "objective", "trainedSteps"), [0, 6], "spec.training.objective.trainedSteps[1]", "write 0 to 3"),
    ((*T, "objective", "trainedSteps"), [], "spec.training.objective.trainedSteps", "at least 1"),
    ((*T, "nodes"), 3, "spec.training.imagesPerTask", "multiple of 3"),
    ((*T, "microBatchSize"), 3, "spec.training.microBatchSize", "divisor of 2"),
    ((*T, "optimizer", "learningRate"), 0, "spec.training.optimizer.learningRate", "more than 0"),
    ((*T, "optimizer", "warmupRounds"), 9999, "spec.training.optimizer.warmupRounds", "leaves no round"),
    ((*T, "ema", "decay"), 1.0, "spec.training.ema.decay", "less than 1"),
    ((*T, "deepspeed", "zeroStage"), 3, "spec.training.deepspeed.zeroStage", "at most 2"),
    ((*T, "precision"), "INT8", "spec.training.precision", "'BF16', 'FP16' or 'FP32'"),
    ((*T, "checkpoint", "keep"), 0, "spec.training.checkpoint.keep", "at least 1"),
    ((*E, "promptsPerTask"), 0, "spec.evaluation.promptsPerTask", "at least 1"),
    ((*E, "gate", 0, "task"), "style", "spec.evaluation.gate[0].task", "write one of [\"geneval\", \"ocr\", \"aesthetic\"]"),
    ((*E, "gate", 0, "reward"), "tiny-ocr", "spec.evaluation.gate[0].reward", "write one of [\"tiny-geneval\"]"),
    ((*E, "gate", 0, "atLeast"), 0.5, "spec.evaluation.gate[0]", "exactly one of the two"),
    ((*E, "gate", 0, "ofTeacher"), REMOVE, "spec.evaluation.gate[0]", "exactly one of the two"),
    ((*S, "endpoint", "replicas"), -1, "spec.endpoint.replicas", "at least 0"),
    ((*S, "endpoint", "rollout", "steps"), [50, 10], "spec.endpoint.rollout.steps", "rising order"),
    ((*S, "endpoint", "autoscaling", "minReplicas"), 9, "spec.endpoint.autoscaling.minReplicas", "at most maxReplicas"),
    ((*S, "endpoint", "pod", "serviceAccountName"), "root", "spec.endpoint.pod.serviceAccountName", "unknown field"),
    ((*S, "endpoint", "pod", "env"), [{"name": "A B", "value": ""}], "spec.endpoint.pod.env[0].name", "no digit first"),
    ((*S, "runPolicy", "backoffLimit"), -1, "spec.runPolicy.backoffLimit", "at least 0"),
    ((*S, "runPolicy", "stageDeadlines", "teachersReady"), 0, "spec.runPolicy.stageDeadlines.teachersReady", "at least 1"),
    ((*S, "managedBy"), "me", "spec.managedBy", "'opd.dev/operator' or 'kueue.x-k8s.io/multikueue'"),
    ((*T, "pod", "resources"), {"limits": {"cpu": "lots"}}, "spec.training.pod.resources.limits.cpu", "e.g. 500m, 2 or 16Gi"),
    ((*T, "pod", "resources"), {"limits": {"memory": "16GB"}}, "spec.training.pod.resources.limits.memory", "e.g. 500m, 2 or 16Gi"),
    ((*T, "pod", "resources"), {"limits": {"memory": "16gi"}}, "spec.training.pod.resources.limits.memory", "e.g. 500m, 2 or 16Gi"),
    ((*T, "pod", "resources"), {"requests": {"memory": "-1Gi"}}, "spec.training.pod.resources.requests.memory", "not a quantity"),
    ((*T, "pod", "nodeSelector"), {"k" * 254: "v"}, "spec.training.pod.nodeSelector", "at most 253"),
    ((*T, "pod", "nodeSelector"), {"disk": "a b"}, "spec.training.pod.nodeSelector.disk", "not the value of a label"),
    ((*T, "pod", "resources"), {"limits": {"gpu": 1}}, "spec.training.pod.resources.limits", "e.g. nvidia.com/gpu"),
    ((*T, "pod", "resources"), {"requests": {"memory": "2Gi"}, "limits": {"memory": "1900M"}}, "spec.training.pod.resources.requests", "at most what limits"),
    ((*T, "pod", "resources"), {"requests": {"nvidia.com/gpu": 1}}, "spec.training.pod.resources.requests", "the same number as limit"),
    ((*T, "pod", "env"), [{"name": "A"}, {"name": "A"}], "spec.training.pod.env[1].name", "each variable once"),
    ((*T, "pod", "tolerations"), [{"key": "a", "operator": "Exists", "value": "b"}], "spec.training.pod.tolerations[0].value", "operator: Equal"),
    ((*T, "pod", "tolerations"), [{"value": "b"}], "spec.training.pod.tolerations[0].key", "operator: Exists"),
    ((*T, "pod", "tolerations"), [{"key": "a", "tolerationSeconds": 5}], "spec.training.pod.tolerations[0].tolerationSeconds", "effect: NoExecute"),
    ((*T, "pod", "tolerations"), [{"key": "a/b/c"}], "spec.training.pod.tolerations[0].key", "not the key of a taint"),
    ((*T, "pod", "priorityClassName"), "a..b", "spec.training.pod.priorityClassName", "not the name of a class"),
    ((*T, "pod", "nodeSelector"), {"disk type": "a"}, "spec.training.pod.nodeSelector", "not the key of a label"),
    ((*T, "pod", "resources"), {"limits": {"a b/c": 1}}, "spec.training.pod.resources.limits", "not the key of a label or resource"),
    ((*T, "pod", "env"), [{"name": "A", "value": "b", "secretKeyRef": {"name": "s", "key": "k"}}], "spec.training.pod.env[0].value", "one of the two"),
    ((*T, "pod", "env"), [{"name": "A", "secretKeyRef": {"name": "other/s", "key": "k"}}], "spec.training.pod.env[0].secretKeyRef.name", "not the name of an object here"),
    ((*T, "pod", "env"), [{"name": "A", "secretKeyRef": {"name": "s", "key": "../k"}}], "spec.training.pod.env[0].secretKeyRef.key", "not the key of a Secret"),
    ((*T, "pod", "volumes"), [{"mountPath": "/data"}], "spec.training.pod.volumes[0]", "exactly one of the three"),
    ((*T, "pod", "volumes"), [{"mountPath": "/data", "claim": "a", "secret": "b"}], "spec.training.pod.volumes[0]", "exactly one of the three"),
    ((*T, "pod", "volumes"), [{"mountPath": "/tmp/x", "claim": "a"}], "spec.training.pod.volumes[0].mountPath", "this path is in use"),
    ((*T, "pod", "volumes"), [{"mountPath": "/var", "claim": "a"}], "spec.training.pod.volumes[0].mountPath", "this path is in use"),
    ((*T, "pod", "volumes"), [{"mountPath": "/a/../b", "claim": "a"}], "spec.training.pod.volumes[0].mountPath", "e.g. /models/cache"),
    ((*T, "pod", "volumes"), [{"mountPath": "/a", "claim": "a"}, {"mountPath": "/a", "claim": "b"}], "spec.training.pod.volumes[1].mountPath", "its own path"),
    ((*T, "pod", "volumes"), [{"mountPath": "/a", "hostPath": "/"}], "spec.training.pod.volumes[0].hostPath", "unknown field"),
    ((*T, "pod", "affinity"), {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": [{"matchExpressions": [{"key": "a", "operator": "In"}]}]}}}, f"spec.training.pod.affinity.nodeAffinity.{REQUIRED}.nodeSelectorTerms[0].matchExpressions[0].values", "In needs values"),
    ((*T, "pod", "affinity"), {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": [{"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["x"]}]}]}}}, f"spec.training.pod.affinity.nodeAffinity.{REQUIRED}.nodeSelectorTerms[0].matchExpressions[0].values", "one whole number"),
    ((*T, "pod", "affinity"), {"podAntiAffinity": {REQUIRED: [{"topologyKey": "a", "labelSelector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["x"]}]}}]}}, f"spec.training.pod.affinity.podAntiAffinity.{REQUIRED}[0].labelSelector.matchExpressions[0].values", "Exists compares no values"),
    ((*S, "endpoint", "route"), {"gateway": "g", "hostnames": []}, "spec.endpoint.route.hostnames", "at least 1"),
    ((*S, "endpoint", "route"), {"gateway": "g", "hostnames": ["a_b"]}, "spec.endpoint.route.hostnames[0]", "not a host name"),
    ((*S, "endpoint"), {"autoscaling": {"minReplicas": 1}, "replicas": 2, "rollout": {"maxSurge": 0}}, "spec.endpoint.autoscaling.minReplicas", "write 2 or more"),
    ((*E, "everyRounds"), 0, "spec.evaluation.everyRounds", "at least 1"),
    ((*T, "rounds"), "10", "spec.training.rounds", "whole number"),
    ((*S, "suspend"), "yes", "spec.suspend", "true or false"),
    ((*S, "suspend"), "perhaps", "spec.suspend", "true or false"),
]  # fmt: skip
