"""Scripts that the bench starts as processes of their own, each by the Python of its contender's environment."""
