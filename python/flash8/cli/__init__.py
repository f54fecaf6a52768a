"""What the commands of the command line do, one file a command; `flash8_cli` has the arguments."""
