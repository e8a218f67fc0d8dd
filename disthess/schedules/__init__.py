"""When audits run: cron expressions, what other schedulers are to be told, and a loop for a machine that has none."""
