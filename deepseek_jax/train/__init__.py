"""Pure train steps, ``(state, batch) -> (state, metrics)``, and the one loop that runs them."""
