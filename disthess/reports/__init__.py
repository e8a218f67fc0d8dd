"""One self-contained page about a run or about a history of audits."""
