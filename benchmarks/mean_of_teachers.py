"""Why not average the LoRAs? The mean of the teachers' LoRAs, which costs nothing, scored as the quickstart's student is.

python benchmarks/mean_of_teachers.py: kept shares and rewards on the example's held-out prompts, with the same noise for
base, teachers and mean. `--write` puts them into docs/figures/mean_of_teachers.json.
"""

import argparse
import tempfile
from pathlib import Path

from figures import write
from opd_core.api.load import load_spec
from opd_core.artifacts import SamplingDefaults, Source, StudentManifest, write_student
from opd_core.models.fingerprint import fingerprint
from opd_core.models.merge import merge
from opd_core.uris import resolve
from opd_trainer.evaluate import evaluate
from opd_trainer.setup import all_teachers

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny" / "distill.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the figures in docs/figures")
    options = parser.parse_args()
    spec, claims = load_spec(EXAMPLE).spec, EXAMPLE.parent
    teachers = list(all_teachers(spec, claims).values())
    base, size = spec.model, spec.training.resolution

    def describe(digest: str) -> StudentManifest:
        return StudentManifest(
            name="mean-of-teachers", digest=digest, teachers=[], spec_digest="", round=0, license="",
            base=Source(uri=base.uri, fingerprint=fingerprint(resolve(base.uri, claims))),
            sampling=SamplingDefaults(width=size.width, height=size.height, steps=1, guidance_scale=1, max_sequence_length=1),
        )  # fmt: skip

    def weights(folder: Path) -> Path:
        merge(teachers, folder)
        return next(folder.glob("*.safetensors"))

    with tempfile.TemporaryDirectory() as scratch:
        mean = Path(scratch, "mean")
        write_student(mean, weights, describe)
        kinds = ("base", "teachers", "student")
        found = evaluate(spec, claims=claims, student=mean, kinds=kinds, output=Path(scratch, "out"), device="cpu")
    kept = {task: f"{share['share']:.0%}".replace("%", " %") for task, share in found["kept"].items()}
    rewards = {reward: f"{score['mean']:.3f}" for reward, score in found["scores"]["student"].items()}
    for name, value in (*kept.items(), *rewards.items()):
        print(f"{name:16} {value}")
    if options.write:
        write("mean_of_teachers", {**kept, **rewards})


if __name__ == "__main__":
    main()
