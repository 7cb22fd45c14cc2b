"""`flynn completion bash|zsh`: the shell asks `flynn completion words` on every Tab, so that it is never out of date.

Offers commands, options, apps, clusters, jobs and process types; whatever goes wrong means no offer.
"""

from __future__ import annotations

from argparse import Namespace

from controller.cli.command import Command, Parser
from controller.cli.session import Session
from discovery.wire.errors import ServiceError

ASK_TIMEOUT_S = 1.5

BASH = """\
_flynn() {
    local IFS=$'\\n'
    COMPREPLY=($(flynn completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
# web=3 is one word for us
COMP_WORDBREAKS=${COMP_WORDBREAKS//=/}
complete -o default -F _flynn flynn
"""

ZSH = """\
#compdef flynn
_flynn() {
    local -a offers suffix
    offers=("${(@f)$(flynn completion words -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    [[ ${offers[1]} == *= ]] && suffix=(-S '')
    [[ -n ${offers[1]} ]] && compadd -Q $suffix -- "${offers[@]}" || _files
}
# sourced: register; found in $fpath by compinit: this file is the function
if [[ ${funcstack[1]} == _flynn ]]; then _flynn; else compdef _flynn flynn; fi
"""


def script(_: Session, arguments: Namespace) -> None:
    """Print a shell's script."""
    print({"bash": BASH, "zsh": ZSH}[arguments.shell], end="")


def words(session: Session, arguments: Namespace) -> None:
    """Print what may come as the last of the given words, one a line."""
    typed = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    for offer in sorted(offers(typed or [""])):
        print(offer)


def offers(typed: list[str]) -> set[str]:
    """Return what the last word may become."""
    from controller.cli import main

    *before, last = typed
    app, cluster, rest = _globals(before)
    if before and before[-1] in ("-a", "--app"):
        return _matching(last, _names(Session(cluster=cluster), "/apps"))
    if before and before[-1] in ("-c", "--cluster"):
        return _matching(last, _clusters())
    if not rest:
        return _matching(last, set(main.NOUNS) | ({"-a", "-c", "--help"} if last.startswith("-") else set()))
    noun = main.ALIASES.get(rest[0], rest[0])
    if noun not in main.NOUNS:
        return set()
    spelled = [noun, *rest[1:]]
    known = [command.words.split() for command in main.commands(noun)]
    verbs = {key[len(spelled)] for key in known if len(key) > len(spelled) and key[: len(spelled)] == spelled}
    if verbs - {"words"}:  # `completion words` is for the scripts, not for people
        return _matching(last, verbs)
    try:
        command, _ = main.find(rest)
    except ServiceError:
        return set()
    return _matching(last, _arguments(command, last, Session(app=app, cluster=cluster))) if command else set()


def _globals(before: list[str]) -> tuple[str, str, list[str]]:
    from controller.cli import main

    try:
        return main._globals(before)
    except ServiceError:
        return "", "", []


def _matching(last: str, known: set[str]) -> set[str]:
    return {word for word in known if word.startswith(last)}


def _clusters() -> set[str]:
    try:
        return {cluster.name for cluster in Session().config.clusters}
    except ServiceError:
        return set()


def _arguments(command: Command, last: str, session: Session) -> set[str]:
    if last.startswith("-"):
        return {option for action in command.parser()._actions for option in action.option_strings}
    noun = command.words
    if noun in ("cluster remove", "cluster default"):
        return _clusters()
    if noun == "completion":
        return {"bash", "zsh"}
    if noun == "kill":
        return _names(session, "jobs")
    if noun == "scale":
        return {f"{kind}=" for kind in _release(session).get("processes", {})}
    if noun in ("env get", "env unset"):
        return set(_release(session).get("env", {}))
    if noun == "env set":
        return {f"{key}=" for key in _release(session).get("env", {})}
    return set()


def _names(session: Session, what: str) -> set[str]:
    """Return names of apps or ids of jobs, asked quietly and briefly."""
    try:
        session.caller.timeout_s = ASK_TIMEOUT_S
        path = what if what.startswith("/") else session.path(what)
        found = session.caller.request("GET", path, into=list[dict[str, object]])
    except ServiceError:
        return set()
    return {str(one.get("name") or one.get("id")) for one in found}


def _release(session: Session) -> dict[str, dict[str, object]]:
    try:
        session.caller.timeout_s = ASK_TIMEOUT_S
        found = session.caller.request("GET", session.path("release"), into=dict[str, object])
    except ServiceError:
        return {}
    return {key: value for key, value in found.items() if isinstance(value, dict)}


def _shell_option(parser: Parser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh"), help="bash or zsh")


def _words_option(parser: Parser) -> None:
    import argparse

    parser.add_argument("words", metavar="WORD", nargs=argparse.REMAINDER, help="the command line so far")


COMMANDS = (
    Command(
        "completion",
        "print the completion script for a shell",
        "source <(flynn completion bash)",
        script,
        _shell_option,
        needs_cluster=False,
        description="For good: `flynn completion bash > /etc/bash_completion.d/flynn`;\n"
        "for zsh put it into a file named _flynn in a folder of $fpath.",
    ),
    Command(
        "completion words",
        "print what may come next (the scripts ask this)",
        "flynn completion words -- rel",
        words,
        _words_option,
    ),
)
