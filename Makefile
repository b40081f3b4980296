# The two targets that a newcomer needs are demo and test.

GO       ?= go
BIN      := bin
TOOLS    := $(CURDIR)/.tools
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS  := -s -w -X main.version=$(VERSION)
GOFLAGS_ := -trimpath -ldflags "$(LDFLAGS)"

# Pinned tools; they are programs, not libraries, so they stay out of go.mod.
LINT_VERSION    := v2.15.0
BUF_VERSION     := v1.75.0
PROTOC_GEN_GO   := v1.36.12
CONNECT_GEN_GO  := v1.21.1

export CGO_ENABLED = 0

.PHONY: help
help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## build both static binaries into bin/
	@mkdir -p $(BIN)
	$(GO) build $(GOFLAGS_) -o $(BIN)/ ./cmd/agentiso ./cmd/agentiso-guest

.PHONY: demo
demo: ## from a fresh machine to a command run inside a VM
	@scripts/install-deps.sh build run
	@$(MAKE) --no-print-directory build
	@scripts/demo.sh

.PHONY: test
test: ## install what the tests need and pass every tier
	@scripts/install-deps.sh build run test
	@$(MAKE) --no-print-directory build
	@$(GO) run ./scripts/testtiers

.PHONY: test-unit
test-unit: ## the unit tier alone: no root, no VM, seconds
	@$(GO) run ./scripts/testtiers -tiers unit

.PHONY: lint
lint: $(TOOLS)/golangci-lint-$(LINT_VERSION) ## golangci-lint over all tiers
	$(TOOLS)/golangci-lint-$(LINT_VERSION) run ./...

$(TOOLS)/golangci-lint-$(LINT_VERSION):
	@echo "building golangci-lint $(LINT_VERSION): some minutes, once"
	GOBIN=$(TOOLS) $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(LINT_VERSION)
	@mv $(TOOLS)/golangci-lint $@

.PHONY: generate
generate: ## make the Go code of api/ anew from its .proto files
	GOBIN=$(TOOLS) $(GO) install github.com/bufbuild/buf/cmd/buf@$(BUF_VERSION)
	GOBIN=$(TOOLS) $(GO) install google.golang.org/protobuf/cmd/protoc-gen-go@$(PROTOC_GEN_GO)
	GOBIN=$(TOOLS) $(GO) install connectrpc.com/connect/cmd/protoc-gen-connect-go@$(CONNECT_GEN_GO)
	cd api && PATH="$(TOOLS):$$PATH" buf lint && PATH="$(TOOLS):$$PATH" buf generate

.PHONY: install
install: build ## install binaries and the systemd unit (root)
	install -Dm755 $(BIN)/agentiso $(DESTDIR)/usr/local/bin/agentiso
	install -Dm755 $(BIN)/agentiso-guest $(DESTDIR)/usr/local/lib/agentiso/agentiso-guest
	install -Dm644 deploy/agentiso.service $(DESTDIR)/etc/systemd/system/agentiso.service

.PHONY: clean
clean: ## remove what build made
	rm -rf $(BIN)
