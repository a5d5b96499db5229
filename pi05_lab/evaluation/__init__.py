"""What a run was like: figures, verdicts, plots and videos."""
