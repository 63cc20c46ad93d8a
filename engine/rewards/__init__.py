"""What an answer is worth: functions, servers, models, weighted sums, scored in the background.

Imports `scoring` and below.
"""
