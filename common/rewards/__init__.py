"""Scores of completions: by the user's task, in processes of their own, inside walls."""
