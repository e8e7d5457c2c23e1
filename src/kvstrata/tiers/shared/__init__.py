"""One folder for many members: what shared tiers have in common, whatever the medium."""
