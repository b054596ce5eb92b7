"""Trainmark: what is a machine worth for training?"""
