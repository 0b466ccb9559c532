"""The first hour on a GPU: a list of checks, each in a process of its own, in the order of what they decide.

``python -m tests.gpu``; see README.md beside this file. pytest collects nothing here.
"""
