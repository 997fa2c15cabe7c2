"""What ships with edgeguard: the mini guard's artifacts. Data only; `edgeguard.store` finds it."""
