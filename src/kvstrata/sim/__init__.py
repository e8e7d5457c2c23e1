"""The simulator: traces through the policies of the live store, and what that says about a choice."""
