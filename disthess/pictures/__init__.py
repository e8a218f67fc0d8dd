"""Pictures by Matplotlib: files beside a run, and drawings inside a report."""
