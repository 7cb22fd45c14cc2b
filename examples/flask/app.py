"""A Flask app to push: it greets."""

import os

from flask import Flask, render_template

app = Flask(__name__)


@app.get("/")
def hello() -> str:
    return render_template("hello.html", port=os.environ["PORT"])
