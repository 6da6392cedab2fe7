# rheap: build, install, try and test. `make help` lists the targets.

PG_CONFIG ?= pg_config
# What the bindings are generated from where no server matters; a machine without ~/.pgrx has no other idea.
export PGRX_PG_CONFIG_PATH ?= /usr/lib/postgresql/15/bin/pg_config

.PHONY: help demo test test-fast install lint bench corpus schema clean

help:
	@echo 'make demo                    install what is needed, let a server leak, show rheap finding it'
	@echo 'make install PG_CONFIG=...   build for that server and install there'
	@echo 'make test                    everything that must hold; builds test servers on first use'
	@echo 'make test PG=18              only the tests of that version, on its server'
	@echo 'make test-fast               the tests that need no server'
	@echo 'make lint                    rustfmt and clippy, no warnings'
	@echo 'make bench SECTIONS=...      what rheap costs, as one table (no SECTIONS: everything, about an hour)'
	@echo 'make corpus MODE=exact      what rheap says of known leaks and of what only looks like them, as one table'
	@echo 'make schema                  regenerate sql/ from the code'

demo:
	@pg_test/scripts/demo.sh

install:
	@pg_test/scripts/install.sh "$(PG_CONFIG)"

test:
	@PG="$(PG)" pg_test/scripts/test.sh

test-fast:
	cargo test --quiet --locked --lib

lint:
	cargo fmt --check
	cargo clippy --quiet --locked --all-targets -- -D warnings

bench:
	@pg_test/scripts/bench.sh $(SECTIONS)

corpus:
	@pg_test/scripts/corpus.sh "$(PG_CONFIG)" $(or $(MODE),sampled)

schema:
	@pg_test/scripts/schema.sh sql/rheap--0.1.0.sql

clean:
	cargo clean
	$(MAKE) -s -C pg_test/modules clean PG_CONFIG="$(PG_CONFIG)"
