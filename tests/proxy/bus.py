"""A D-Bus service that answers a file with a file, and its client.

    bus.py serve ADDRESS
    bus.py call ADDRESS TEXT
"""

import os
import sys

from jeepney import DBusAddress, MessageType, message_bus, new_method_call, new_method_return
from jeepney.io.blocking import open_dbus_connection

NAME = "test.Files"


def file_of(content):
    file = os.memfd_create("passed")
    os.write(file, content)
    return file


def content_of(passed):
    with passed.to_file("rb") as file:
        file.seek(0)
        return file.read()


def serve(bus):
    # 1: this is the only owner.
    assert bus.send_and_get_reply(message_bus.RequestName(NAME)).body == (1,)
    print("serving", file=sys.stderr, flush=True)
    while True:
        call = bus.receive()
        if call.header.message_type == MessageType.method_call:
            answer = file_of(b"an answer to " + content_of(call.body[0]))
            bus.send(new_method_return(call, "h", (answer,)))
            os.close(answer)


def call(bus, text):
    service = DBusAddress("/", bus_name=NAME, interface=NAME)
    question = file_of(text.encode())
    answer = bus.send_and_get_reply(new_method_call(service, "Exchange", "h", (question,)))
    assert answer.header.message_type == MessageType.method_return, answer
    print(content_of(answer.body[0]).decode())


command, address, *rest = sys.argv[1:]
with open_dbus_connection(address, enable_fds=True, auth_timeout=20) as bus:
    {"serve": serve, "call": call}[command](bus, *rest)
