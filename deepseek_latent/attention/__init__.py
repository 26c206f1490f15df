"""Multi-head Latent Attention: projections, the absorbed and the expanded form, rotary positions."""
