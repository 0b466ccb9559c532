"""The composition root: the only part that knows every concrete class and how many machines there are."""
