"""One attention call: its options, its sizes, and the checks that turn bad input into errors."""
