"""What `plan` predicts, beside what is counted or timed."""
