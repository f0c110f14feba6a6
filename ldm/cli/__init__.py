"""The command line: the only place that knows argparse, flags and the names of scripts."""
