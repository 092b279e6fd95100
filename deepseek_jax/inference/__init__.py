"""From parameters and prompts to tokens: sampling, the jitted prefill and decode, and the engine around them."""
