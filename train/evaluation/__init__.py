"""Asking a model the questions of tasks, and saying what the answers are worth.

questions.py    tasks and files ──► Question: what is asked, what is right, which reward compares them
asking.py       questions ──► attempts, through the agent, many at once; answers.jsonl grows as they finish
likelihood.py   how probable the right answers are, in packed rows
statistics.py   pass@k, means with their intervals, paired tests
results.py      attempts ──► results.json
terminal.py, page.py, tables.py    results and answers to look at: terminal, HTML page, trackers
comparing.py    two evaluations of the same questions
"""
