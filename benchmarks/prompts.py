"""The held-out prompts: what every benchmark and the parity check decode.

Written by hand for this purpose, and in no training data: the head learns from text that the base model wrote itself, from
the starters in `scripts/head_data.py`. Three kinds, because acceptance differs between them:

    chat    a user's question, put through the chat template      code    the start of a Python file, continued raw
    prose   the start of an English text, continued raw

Code ends at the end of a line, without the line break: the tokenizer joins a break with the indentation that follows it.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

CHAT = [
    "Explain what a hash table is, in two sentences.",
    "My basil plant keeps wilting even though I water it every day. What am I doing wrong?",
    "I have eggs, spinach and half an onion. What can I cook in fifteen minutes?",
    "Which is heavier, a litre of ice or a litre of water, and why does that matter for lakes in winter?",
    "Could you help me write a polite message to my landlord about a broken heater?",
    "What does the word 'serendipity' mean? Use it in a sentence about a train journey.",
    "My daughter asked me why the moon follows our car at night. How can I answer so that a six-year-old understands?",
    "Name three differences between a lease and a licence.",
    "I'm nervous about a job interview on Monday. Any advice for the first five minutes?",
    "Write a short poem about an umbrella that is afraid of rain.",
    "How do I undo my last commit in git without losing the changes?",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey?",
    "Please summarise the water cycle as four bullet points.",
    "What should I pack for a weekend hike in the mountains in October?",
    "Is it safe to charge my phone overnight?",
    "Give me a Python function that counts the vowels in a string, and show how to call it.",
    "Who painted the ceiling of the Sistine Chapel, and how long did it take?",
    "I keep forgetting people's names right after I meet them. Do you know a trick that works?",
    "Suggest a name and a slogan for a small bakery that only opens at night.",
    "Why does bread dough need to rest before it goes into the oven?",
    "Turn this into formal English: gonna be late, traffic's awful, start without me.",
    "What are the advantages and disadvantages of living in a small town?",
    "Tell me a bedtime story about a lighthouse keeper and a lost whale.",
    "How would you explain inflation to someone who has never heard of it?",
]

CODE = [
    '''def moving_average(values, window):
    """Return the mean of every `window` consecutive values."""
    if window <= 0:
        raise ValueError("window must be positive")
    result = []''',
    '''import csv
from collections import defaultdict


def total_by_category(path):
    """Sum the column "amount" of a CSV file per value of the column "category"."""''',
    '''class BankAccount:
    """An account that refuses to be overdrawn."""

    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):''',
    '''def is_palindrome(text):
    """True if the letters of `text` read the same in both directions."""
    letters = [c.lower() for c in text if c.isalpha()]''',
    """import sqlite3

connection = sqlite3.connect("library.db")
cursor = connection.cursor()
cursor.execute("CREATE TABLE IF NOT EXISTS books (id INTEGER PRIMARY KEY, title TEXT, author TEXT)")""",
    """def gcd(a, b):
    while b:
        a, b = b, a % b
    return a


def lcm(a, b):""",
    """import unittest

from shapes import Circle, Rectangle


class TestRectangle(unittest.TestCase):
    def test_area(self):""",
    """from dataclasses import dataclass, field


@dataclass
class Recipe:
    name: str
    servings: int
    ingredients: list[str] = field(default_factory=list)""",
    '''def bubble_sort(items):
    """Sort a list in place and return the number of swaps."""
    swaps = 0
    for end in range(len(items) - 1, 0, -1):''',
    """import asyncio
import random


async def worker(name, queue):
    while True:
        job = await queue.get()""",
    """# Convert temperatures between Celsius, Fahrenheit and Kelvin.

def celsius_to_fahrenheit(celsius):
    return celsius * 9 / 5 + 32


def fahrenheit_to_celsius(fahrenheit):""",
    """class LinkedList:
    def __init__(self):
        self.head = None
        self.size = 0

    def append(self, value):
        node = Node(value)""",
    """import argparse
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def build_parser():""",
    """def matrix_multiply(a, b):
    rows, inner, columns = len(a), len(b), len(b[0])
    if len(a[0]) != inner:
        raise ValueError("the shapes do not match")""",
    """import re

EMAIL = re.compile(r"[\\w.+-]+@[\\w-]+\\.[\\w.]+")


def extract_emails(text):""",
    """from flask import Flask, jsonify, request

app = Flask(__name__)
tasks = []


@app.route("/tasks", methods=["GET"])""",
    '''def word_frequencies(path, limit=10):
    """The `limit` most common words of a text file, with their counts."""
    counts = {}
    with open(path, encoding="utf-8") as file:''',
    '''import numpy as np


def gradient_descent(x, y, learning_rate=0.01, num_steps=1000):
    """Fit y = w * x + b and return w and b."""
    w, b = 0.0, 0.0''',
    '''class Stack:
    """Last in, first out."""

    def __init__(self):
        self._items = []

    def push(self, item):
        self._items.append(item)''',
    '''def flatten(nested):
    """Flatten lists of lists of any depth: [1, [2, [3]]] -> [1, 2, 3]."""
    flat = []
    for element in nested:''',
    '''import time
from functools import wraps


def timed(function):
    """Print how long each call of the decorated function takes."""''',
    """def caesar_cipher(message, shift):
    encoded = []
    for character in message:
        if character.isupper():""",
    """class Matrix:
    def __init__(self, rows):
        self.rows = [list(row) for row in rows]

    def __eq__(self, other):
        return self.rows == other.rows

    def transpose(self):""",
    '''import json
import urllib.request

API = "https://api.example.com/v1/weather"


def fetch_forecast(city, days=3):
    """Download the forecast for a city and return a list of (date, temperature) pairs."""''',
]

PROSE = [
    "The council voted on Tuesday evening to close the old bridge to cars for at least two years, after engineers found",
    "Marta had not opened the piano since her brother left. On the first warm day of April she lifted the lid and",
    "The common swift is a medium-sized migratory bird that spends most of its life in the air. It feeds, drinks and",
    "Before you paint a wooden fence, clean it with a stiff brush and warm water. Let it dry for a full day, then",
    "There is a particular silence in a library just before it closes, and I have come to think that",
    "Shares in the country's largest shipping company fell sharply on Monday after it warned that",
    "A volcano forms where molten rock from deep inside the planet finds a way to the surface. The shape of its cone depends on",
    "The detective put the letter down and looked at the clock again. Nobody in the house, she was sure now,",
    "Tea was first brought to Europe by Dutch merchants in the early seventeenth century. At that time it was",
    "To make a simple vegetable soup, begin by chopping two carrots, a leek and a stick of celery. Heat a little oil and",
    "We tend to speak of memory as if it were a storehouse, but anyone who has compared recollections with a sibling knows that",
    "Heavy snow brought traffic to a standstill across the north of the country last night, leaving hundreds of drivers",
    "Beyond the last farm the road became a track, and beyond the gate the track became nothing at all. Tomas stopped and",
    "The abacus is one of the oldest tools for calculation. It consists of a frame with rods, along which",
    "A good night's sleep begins long before bedtime. Doctors recommend that adults",
    "When the orchestra announced its new conductor last spring, few people in the audience had heard of her. Now",
    "Old Henrik mended clocks in a shop no wider than a corridor. Every evening, at exactly six,",
    "Photosynthesis takes place in the leaves of green plants, where small structures called chloroplasts",
    "The argument for shorter working weeks is usually made in terms of happiness. There is, however, another reason:",
    "If your bicycle chain keeps slipping, the first thing to check is whether",
    "Researchers at the coastal station have spent eleven years counting seals. Their latest figures suggest that",
    '"You can\'t mean to sail tonight," said the harbour master, pulling his coat tighter. "Not with',
    "The Silk Road was not a single road but a network of routes that connected",
    "My grandmother kept her recipes in a biscuit tin, written on the backs of envelopes, and none of them",
]

PROMPTS: dict[str, list[str]] = {"chat": CHAT, "code": CODE, "prose": PROSE}


def encode(tokenizer: PreTrainedTokenizerBase, kind: str, text: str) -> list[int]:
    """The prompt's token ids: a chat question inside the chat template, code and prose as they stand."""
    if kind != "chat":
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    turns = [{"role": "user", "content": text}]
    # As text first: the template writes its own special tokens, and the tokenizer must not add a second pair.
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def selection(num_per_kind: int) -> list[tuple[str, str]]:
    """(kind, text) of the first `num_per_kind` prompts of each kind, the kinds in turn, so that a short run sees them all."""
    chosen = (texts[:num_per_kind] for texts in PROMPTS.values())
    return [(kind, text) for row in zip(*chosen, strict=True) for kind, text in zip(PROMPTS, row, strict=True)]
