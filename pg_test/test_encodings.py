"""Reports in databases whose text is not UTF-8. No session is stopped here: DROP DATABASE waits for all."""

import json
import time
import xml.etree.ElementTree as xml

import pytest
from reports import METRICS, folded_sum

# Of an encoding: text that it has.
ENCODINGS = {"LATIN1": "gr\u00f6\u00dfer", "EUC_JP": "\u3042\u4e9c", "SQL_ASCII": "gr\u00f6\u00dfer \u3042", "UTF8": "gr\u00f6\u00dfer \U0001f600"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_reports_are_the_same_in_a_database_of_any_encoding(exact, encoding):
    reason = ENCODINGS[encoding]
    session = exact.session()
    for _ in range(12):
        session("SELECT leaky_leak(200, 1000)")
        time.sleep(0.02)
    pid = session.pid
    session("SELECT 1")
    columns = ", ".join(f"{sum}::int8 AS {name}" for name, sum in METRICS.items() if name != "growth")
    [totals] = exact.rows(f"SELECT {columns} FROM rheap_call_sites({pid})")
    exact.sql(f"CREATE DATABASE other ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    exact.sql("ALTER DATABASE other SET client_encoding = 'UTF8'")
    ask = lambda call: exact.sql(f"SELECT {call}", database="other")
    try:
        ask("1; CREATE EXTENSION rheap")
        ask(f"rheap_suppress('leaky_leak', '{reason}')")
        report = json.loads(ask(f"rheap_report_json({pid})"))
        [site] = [s for s in report["call_sites"] if s["function"] == "leaky_leak"]
        assert site["reason"] == f"suppressed by 'leaky_leak': {reason}"
        assert ask(f"reason FROM rheap_call_sites({pid}) WHERE function = 'leaky_leak'") == site["reason"]
        html = ask(f"rheap_html({pid})")
        data = json.loads(html.split('type="application/json">')[1].split("</script>")[0])
        [site] = [s for s in data["call_sites"] if s["function"] == "leaky_leak"]
        assert html.isascii() and site["reason"].endswith(reason)
        for metric in totals:
            assert folded_sum(ask(f"rheap_folded({pid}, '{metric}')")) == totals[metric]
            assert xml.fromstring(ask(f"rheap_flamegraph({pid}, '{metric}')")).tag.endswith("svg")
        heaptrack = ask(f"rheap_heaptrack({pid})")
        assert heaptrack.isascii() and heaptrack.startswith("v 10400 3\nX rheap, ")
        assert ask(f"encode(rheap_pprof({pid}), 'hex')").startswith("1f8b")
        assert "none: nothing here keeps growing" in ask(f"rheap_report({pid})")
        ask(f"rheap_snapshot('{reason}')")
        assert ask("label FROM rheap_snapshots") == reason
        assert ask("count(*) FROM rheap_diff((SELECT id FROM rheap_snapshots)) WHERE function = 'leaky_leak'") == "0"
    finally:
        session.close()
        exact.sql("DROP DATABASE other")
