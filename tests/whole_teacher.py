"""A teacher with a model of its own, made as people make one: a LoRA fused into its base and saved."""

from pathlib import Path

from opd_core.imports import without_collection

with without_collection():
    from diffusers import StableDiffusion3Pipeline


def fuse(base: Path, adapter: Path, folder: Path) -> Path:
    """diffusers' own merge, in float32; all but the transformer are links to the base's."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(base, local_files_only=True)
    pipeline.load_lora_weights(adapter)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    folder.mkdir(parents=True)
    for part in base.iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part)
    pipeline.transformer.save_pretrained(folder / "transformer")
    return folder
