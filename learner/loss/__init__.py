"""The mathematics: advantages and losses."""
