"""From noise to latents: noise levels, guidance, and the sampler. Nothing here knows a network."""
