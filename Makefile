# The commands of README.md and CONTRIBUTING.md.

# The shipped units say /usr/bin.
PREFIX ?= /usr
DESTDIR ?=
CARGO ?= cargo
INSTALL ?= install
# Packages of Debian install completions in vendor-completions, others in site-functions.
ZSHDIR ?= $(PREFIX)/share/zsh/$(if $(filter /usr,$(PREFIX)),vendor-completions,site-functions)

TARGET = $(or $(CARGO_TARGET_DIR),target)
# The Debian in which the tests run, as new as this one.
RELEASE ?= $(or $(shell . /etc/os-release && echo $$VERSION_CODENAME),trixie)
IN_ROOT = $(CURDIR)/tests/root run $(RELEASE)
BY_CARGO = --config "target.'cfg(unix)'.runner = ['$(CURDIR)/tests/root', 'run', '$(RELEASE)']"

.PHONY: build demo quick test root sim soak portability vm check bench fmt clippy doc man deny fuzz mutants install deb rpm clean

build:
	$(CARGO) build --release --locked

# The main job, shown: a Unix-socket service behind a TCP port.
demo: build
	examples/demo $(TARGET)/release/socket-proxyd

# What needs neither root nor a package, in less than a minute after the build.
quick:
	$(CARGO) test --locked --lib --test activation --test attacks --test documents --test forward --test layout --test packaging
	$(CARGO) test --locked --test proxy -- accept_yes:: drain:: notifications:: selectors::

# Makes a Debian with what the tests need (as root, or by sudo) and runs them all in it, whichever fail.
# Most tests wait: four at a time take half a core.
test: root deb rpm
	RUST_TEST_THREADS=4 $(CARGO) test $(BY_CARGO) --locked --no-fail-fast

root:
	tests/root make $(RELEASE)

# A million seeds, a sixth on each simulation; SEED=N replays one.
sim:
	SEEDS=$(or $(SEEDS),170000) $(CARGO) test --release --locked --test simulation

# Each mode for 20 minutes under traffic of which every byte is checked; SOAK_SECONDS= is another time.
# The last lines are a table of figures. One mode: make soak MODE=crash.
soak:
	SOAK_SECONDS=$${SOAK_SECONDS:-1200} \
	    $(CARGO) test --locked --release --test soak -- $(MODE)

# On other architectures, with musl, the oldest Rust, the oldest dependencies, and other Debians' systemd.
# Only some Debians: make portability RELEASES="bullseye sid"
portability:
	tests/portability $(RELEASES)

# The suites on Debian's kernels, each under its release's systemd, in a virtual machine: an hour each.
# One of them: make vm RELEASES=bookworm SUITES=proxy.
vm:
	SUITES="$(SUITES)" tests/vm $(RELEASES)

check: fmt clippy doc man deny bench

# Once and short, so that a broken benchmark is noticed; in full: make bench BENCH=
BENCH ?= --quick --markdown=target/bench/tables.md

bench: root
	$(CARGO) bench $(BY_CARGO) --locked -- $(BENCH)

fmt:
	$(CARGO) fmt --check

clippy:
	$(CARGO) clippy --locked --all-targets -- -D warnings

doc:
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" \
	    $(CARGO) doc --locked --no-deps --document-private-items

# The pages render without a warning.
man: root
	@for page in man/*.8; do \
	    words=$$($(IN_ROOT) groff -man -ww -Tutf8 -z $$page 2>&1; \
	        MANWIDTH=80 $(IN_ROOT) man --warnings=w --local-file $$page 2>&1 >/dev/null); \
	    test -z "$$words" || { echo "$$words"; exit 1; }; \
	done

# Licences, sources and duplicates, but no advisories: they need a network that CI may not have.
deny:
	command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny --locked --log-level error check bans licenses sources

# Runs each fuzz target for FUZZ_SECONDS, one after another, until one fails. What they find stays in
# fuzz/corpus-found. Needs the nightly toolchain, and for some targets systemd 252. FUZZ_SANITIZER=address
# takes longer, and looks into the unsafe code.
FUZZ_SECONDS ?= 3600
FUZZ_SANITIZER ?= none
FUZZ_TARGETS ?= $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))

fuzz:
	command -v cargo-fuzz >/dev/null || $(CARGO) install --locked cargo-fuzz
	cd fuzz && $(CARGO) +nightly fuzz build -s $(FUZZ_SANITIZER)
	for target in $(FUZZ_TARGETS); do \
	    mkdir -p fuzz/corpus-found/$$target && \
	    (cd fuzz && $(CARGO) +nightly fuzz run -s $(FUZZ_SANITIZER) $$target corpus-found/$$target corpus/$$target -- \
	        -max_total_time=$(FUZZ_SECONDS) -timeout=10 -print_final_stats=1) || exit 1; \
	done

# Changes the forwarder, the handover and COMMAND in each way that cargo-mutants knows, and runs the unit tests and the
# simulation on each. target/mutants/mutants.out/missed.txt lists the changes that none of them noticed. Takes hours; a
# second run goes on where the first was stopped. Other tests: make mutants MUTANT_TESTS="--lib --test=forward".
MUTANTS ?= src/forward/*.rs src/handover/*.rs src/backend/lifecycle.rs src/backend/starter.rs src/backend/command/*.rs
MUTANT_TESTS ?= --lib --test=simulation

mutants:
	command -v cargo-mutants >/dev/null || $(CARGO) install --locked cargo-mutants
	SEEDS=$(or $(SEEDS),300) CARGO_PROFILE_DEV_DEBUG=0 $(CARGO) mutants --iterate --no-shuffle --timeout 120 \
	    -o target/mutants $(addprefix -f ,$(wildcard $(MUTANTS))) \
	    -C=--locked $(addprefix -C=,$(MUTANT_TESTS)) -- -- --skip fuzz

# The drawings of docs/architecture.md; needs Graphviz.
docs/%.svg: docs/%.dot
	dot -Tsvg $< -o $@

# The README's picture for a dark page: other colours of the same shapes.
docs/on-demand-dark.svg: docs/on-demand.svg
	sed -e '/<!--/d' -e 's/#eef2f7/#212830/; s/#fdf3e1/#3a2e14/; s/#e6f4ea/#12351f/; s/#5b6b7f/#8b98a9/g' \
	    -e 's/#24292f/#e6edf3/; s/#57606a/#9da7b3/' $< >$@

# After `make`, which needs no root.
install:
	@test -x $(TARGET)/release/socket-proxyd || { echo "Run make first." >&2; exit 1; }
	for program in socket-proxyd socket-proxyd-units; do \
	    $(INSTALL) -D -m 755 $(TARGET)/release/$$program $(DESTDIR)$(PREFIX)/bin/$$program && \
	    $(INSTALL) -D -m 644 man/$$program.8 $(DESTDIR)$(PREFIX)/share/man/man8/$$program.8 && \
	    $(INSTALL) -D -m 644 completions/$$program.bash \
	        $(DESTDIR)$(PREFIX)/share/bash-completion/completions/$$program && \
	    $(INSTALL) -D -m 644 completions/_$$program $(DESTDIR)$(ZSHDIR)/_$$program && \
	    $(INSTALL) -D -m 644 completions/$$program.fish \
	        $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/$$program.fish || exit 1; \
	done
	$(INSTALL) -D -m 644 -t $(DESTDIR)$(PREFIX)/share/doc/socket-proxyd \
	    README.md CHANGELOG.md BENCHMARKS.md LICENSE-MIT LICENSE-APACHE docs/grafana.json \
	    docs/recipes.md docs/nixos.nix
	for set in units/*; do \
	    $(INSTALL) -d $(DESTDIR)$(PREFIX)/share/doc/socket-proxyd/examples/$${set#units/} && \
	    cp -r $$set/. $(DESTDIR)$(PREFIX)/share/doc/socket-proxyd/examples/$${set#units/} || exit 1; \
	done
	chmod -R u=rwX,go=rX $(DESTDIR)$(PREFIX)/share/doc/socket-proxyd/examples

# The packages, from what `make` has built; they say where they are. Rust 1.85 builds these versions of the tools.
deb: build
	@command -v cargo-deb >/dev/null || $(CARGO) install --locked cargo-deb@3.6.0
	@$(CARGO) deb --locked --no-build

rpm: build
	@command -v cargo-generate-rpm >/dev/null || $(CARGO) install --locked cargo-generate-rpm@0.20.0
	@$(CARGO) generate-rpm && ls $(TARGET)/generate-rpm/*.rpm

clean:
	[ ! -d target/roots ] || tests/root remove
	$(CARGO) clean
