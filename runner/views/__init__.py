"""How a run looks to people: in the terminal, as a page, in a browser that follows it.

facts      what is known of a run, read from the store and this machine
overview   pure: the facts as one plain JSON document; every view draws that, and nothing else
terminal   the document in a terminal, live or once
page       the document as one HTML file that asks for nothing
server     the same pages for all runs of a store, live, on this machine
"""
