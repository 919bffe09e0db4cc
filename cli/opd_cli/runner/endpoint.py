"""Deployed: the endpoint answers with a picture; if asked to, it stays until Ctrl-C."""

import time
from pathlib import Path

from opd_core import roles
from opd_core.api.digests import digest, said
from opd_core.ports import free_ports
from opd_core.stages import Reason, Stage
from opd_core.uris import resolve

from opd_cli.runner.context import POLL_SECONDS, Run
from opd_cli.runner.supervise import Server


def deploy(run: Run, *, serve: bool) -> None:
    """Nothing where the endpoint has answered for this student before, unless it shall stay."""
    run.stop.check()
    key = digest(run.student_digest(), said(run.spec.endpoint))
    deployed = run.work.done(Stage.DEPLOYED)
    if not serve and deployed and deployed["key"] == key and Path(deployed["picture"]).exists():
        run.display.stage(Stage.DEPLOYED, Reason.UP_TO_DATE, f"answered with {deployed['picture']}")
        return
    run.display.stage(Stage.DEPLOYED, Reason.STARTING, "image endpoint")
    if run.spec.endpoint.api_keys:
        run.display.note("endpoint.apiKeys is a Secret of a cluster: here everybody on this machine may ask")
    began = time.monotonic()
    with Server(
        run.supervision, Stage.DEPLOYED, lambda: roles.endpoint(run.place, run.distillation, *free_ports(2))
    ) as server:
        run.wait_ready([server], Stage.DEPLOYED)
        url = f"http://127.0.0.1:{server.recipe.ports['http']}"
        picture = _generate(run, url)
        run.work.finish(Stage.DEPLOYED, key=key, picture=str(picture), seconds=time.monotonic() - began)
        run.display.stage(Stage.DEPLOYED, Reason.COMPLETED, f"{url} answered with {picture}")
        if serve:
            run.display.note(f"serving on {url}/v1 until Ctrl-C")
        while serve and not run.stop.asked:
            server.keep_alive()
            time.sleep(POLL_SECONDS)


def _generate(run: Run, url: str) -> Path:
    from opd_trainer.prompt_files import load_prompts

    from opd_cli.generate import request_images, write_images

    prompts = run.spec.teachers[0].prompts
    prompt = load_prompts(resolve(prompts.held_out_uri or prompts.uri, run.work.claims))[0].prompt
    name = "student.png" if run.spec.training.resolution.frames == 1 else "student.webp"
    (file,) = write_images(request_images(url, prompt, seed=0), run.work.path / "images" / name)
    run.display.note(f"asked for {prompt!r}")
    return file
