"""Where engines meet the store. Each engine has a folder; none is imported before it is used."""
