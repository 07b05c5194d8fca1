"""The commands: one file or folder for each, with the function that `finhpc COMMAND` runs."""
