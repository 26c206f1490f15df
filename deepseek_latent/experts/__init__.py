"""DeepSeekMoE: the router, the experts, how these are stored and how tokens are multiplied by them."""
