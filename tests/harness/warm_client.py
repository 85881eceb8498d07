"""What `WarmPython.command` starts: asks for a program, hands signals on to it, and ends as it ends."""

import array
import json
import os
import signal
import socket
import sys

HANDED_ON = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT]

signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)
umask = os.umask(0)
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
request = {"arguments": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd(), "umask": umask}
streams = array.array("i", [0, 1, 2])
text = json.dumps(request).encode() + b"\n"
sent = connection.sendmsg([text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
connection.sendall(text[sent:])
answers = connection.makefile()
program = int(answers.readline())
for number in HANDED_ON:
    signal.signal(number, lambda number, _: os.kill(program, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
sys.exit(code)
