"""Weights of rewards on the hub, each at a commit: scores, and a gate with them, must not change with a push."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hub:
    """A repository of the hub at a revision, or a folder, for which the revision says nothing."""

    repo: str
    revision: str


CLIP_L = Hub("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
CLIP_H = Hub("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")
PICKSCORE = Hub("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800")
HPSV2 = Hub("xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a")
AESTHETIC_HEAD = Hub("trl-lib/ddpo-aesthetic-predictor", "cf4bd10345610935a80a5d3be9a3133c50f121e4")
IMAGE_REWARD = Hub("zai-org/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72")
BERT = Hub("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594")  # its tokeniser
# Not pinned: no commit of this repository could be found without asking the hub.
MASK2FORMER = Hub("facebook/mask2former-swin-small-coco-instance", "main")
