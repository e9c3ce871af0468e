"""The same question answered by stepping through time, for tests and `bench/`: no
command uses it. `simulate` runs one pass, `rehearsal` the real decisions with nothing
behind them."""
