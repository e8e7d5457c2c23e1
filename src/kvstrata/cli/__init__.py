"""The command line: one file per command. Commands parse and print; what they find out is below them."""
