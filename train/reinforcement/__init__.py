"""Reinforcement learning above the loop: from prompts to rows that are worth learning.

prompts.py     records ──► questions with rewards                 difficulty.py   which of them are asked
engines.py     who samples: our engine, or vLLM                   scoring.py      what an attempt is worth
collect.py     questions ──► groups of scored attempts            advantage.py    worth ──► advantages
examples.py    a group ──► one example whose attempts share the prompt
source.py      all of it, update after update: a `loop.Source`
mismatch.py    how far engine and trainer disagree                record.py       tables and plots of it all
"""
