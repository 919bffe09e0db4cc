"""What some methods tell of a round: means over its images, or over their trained steps."""

FIGURES = {
    "reward": "Weighted sum of the rewards of the sampled images.",
    "reward_error": "Standard error of that mean, over the round's prompts.",
    "group_std": "Its standard deviation among the images of one prompt.",
    "flat_groups": "Share of the prompts whose images all had the same reward, and taught nothing.",
    "old_distance": "DiffusionNFT: squared distance of the trained policy's velocities to the sampling one's.",
    "ratio": "GRPO: ratio of the trained policy's likelihood to the sampling one's; 1 before the first update.",
    "clipped": "GRPO: share of the ratios outside the clip range.",
    "fake_loss": "DMD2, TDM: what the fake score could not follow of the student, with the noise that nobody can.",
    "norm_ratio": "Length of the policy's velocities, relative to the base's: growth brightens images.",
}
