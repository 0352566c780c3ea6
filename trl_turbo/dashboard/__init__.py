"""What a training shows of itself: a live table, a JSON-lines log, the latest completions and an HTML report.

It observes: it changes no tensor, draws no random number and resets no statistic.
"""
