"""The primitives in plain torch and float64, written to be read: the oracle of every test, on any device."""
