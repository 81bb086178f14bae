"""What a cloud says beforehand: that this machine will be taken away, and when.

Each cloud tells its machines so at an address that only they can reach. One thread for each cloud
of the job file asks there, and tells what it hears, once. A service that is absent, slow or out of
order costs nothing but a line in the log: SIGTERM remains.

    aws.py  gcp.py  azure.py     what is asked, and what the answers mean
    metadata.py                  one request, bounded in time and in size
    news.py                      what there is to tell: each thing once, on this machine's clock
    watch.py                     the threads
"""

from runner.notices.metadata import URL_VARIABLE, MetadataServer
from runner.notices.news import Advice, News, Preemption
from runner.notices.watch import Watch, problem_of

__all__ = [
    "URL_VARIABLE",
    "Advice",
    "MetadataServer",
    "News",
    "Preemption",
    "Watch",
    "problem_of",
]
