"""The parent's side: one process's life, the channel on the loop, the states of envs, the workers together."""
