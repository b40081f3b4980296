// Package agentiso_test holds the whole module to the rules of its house that no
// compiler checks: who may import whom, names of packages, sizes of files.
package agentiso_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/agentiso/agentiso"

// A rule says what the packages that match may import of this module. A
// pattern is a path below the module, or "x/..." for x and all below it, or
// "x/*" for what lies directly below x.
type rule struct {
	packages string
	may      []string // patterns
	tests    []string // what their tests may import besides
}

// basis is what every driver stands on.
var basis = []string{"internal/domain", "internal/fault", "internal/undo", "internal/cmdrun", "api/..."}

func on(patterns ...string) []string { return append(slices.Clone(basis), patterns...) }

// rules from the bottom to the top; the first that matches a package is its
// rule. Siblings never import each other, the guest's side imports no host
// package, and only cmd/agentiso sees everything.
var rules = []rule{
	{"api/...", []string{"api/..."}, nil},
	{"internal/domain", nil, nil},
	{"internal/fault", nil, nil},
	{"internal/undo", nil, nil},
	{"internal/cmdrun", nil, nil},
	{"internal/measure", nil, nil},
	{"internal/link/wire", nil, nil},

	// The guest's side. It does without package fault, to stay small.
	{"internal/guest/...", []string{"internal/guest/...", "internal/link/wire", "api/..."}, nil},
	// Its tests boot it, as the host does.
	{
		"cmd/agentiso-guest",
		[]string{"internal/guest/...", "internal/link/wire", "api/..."},
		[]string{"internal/domain", "internal/image/...", "internal/link", "internal/qemu"},
	},

	{"internal/config", []string{"internal/fault"}, nil},
	{"internal/telemetry", []string{"internal/domain", "internal/fault"}, nil},

	// Drivers.
	{"internal/storage", on(), nil},
	{"internal/storage/storagetest", on("internal/storage"), nil},
	{"internal/storage/*", on(), []string{"internal/storage", "internal/storage/storagetest"}},
	{"internal/network", on(), nil},
	{"internal/network/*", on(), []string{"internal/network"}},
	{"internal/qemu/...", on("internal/qemu/..."), nil},
	// Its tests speak to the guest's end of the link.
	{"internal/link", on("internal/link/wire"), []string{"internal/link", "internal/guest/port/..."}},
	{"internal/image/...", on("internal/image/..."), nil},
	{"internal/state", on(), nil},
	{"internal/generation/...", on("internal/generation/..."), nil},

	// What decides reaches drivers through interfaces of its own only.
	{"internal/workspace/...", []string{"internal/workspace/...", "internal/domain", "internal/fault", "internal/undo", "api/..."}, nil},
	{"internal/warm", []string{"internal/workspace", "internal/domain", "internal/fault", "internal/undo", "api/..."}, nil},

	// Front doors: adapters over workspace.
	{"internal/server/...", frontDoor("internal/server/..."), nil},
	{"internal/mcp/...", frontDoor("internal/mcp/..."), nil},
	{"internal/web/...", frontDoor("internal/web/..."), nil},
	// Its tests talk to a daemon over fakes.
	{"client/...", []string{"client/...", "api/...", "internal/fault"}, []string{"internal/server/servertest"}},

	{"cmd/agentiso", []string{"client/...", "api/...", "internal/..."}, nil},
	{"scripts/...", []string{"internal/cmdrun"}, nil},
	{"", nil, []string{"internal/...", "client/...", "api/..."}}, // tests of the whole
}

func frontDoor(own string) []string {
	return []string{own, "internal/workspace", "internal/warm", "internal/domain", "internal/fault", "client", "api/..."}
}

// exceptions are taken away from what a rule gives.
var exceptions = map[string][]string{
	// Host and guest meet on the wire only.
	"cmd/agentiso": {"internal/guest/..."},
}

func matches(pattern, pkg string) bool {
	if base, ok := strings.CutSuffix(pattern, "/..."); ok {
		return pkg == base || strings.HasPrefix(pkg, base+"/")
	}
	if base, ok := strings.CutSuffix(pattern, "/*"); ok {
		return path.Dir(pkg) == base
	}
	return pattern == pkg
}

func anyMatches(patterns []string, pkg string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, pkg) })
}

// pkg is what go list says of a package.
type pkg struct {
	ImportPath                         string
	Name                               string
	Doc                                string
	Imports, TestImports, XTestImports []string
}

// violations returns every import that the rules do not allow, one a line.
func violations(pkgs []pkg) []string {
	var bad []string
	for _, p := range pkgs {
		name := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		i := slices.IndexFunc(rules, func(r rule) bool { return matches(r.packages, name) })
		if i < 0 {
			bad = append(bad, name+" has no rule: add it to the table in imports_test.go and to the design")
			continue
		}
		r := rules[i]
		check := func(imports []string, test bool) {
			for _, imp := range imports {
				to, ok := strings.CutPrefix(imp, module+"/")
				if !ok || test && to == name {
					continue
				}
				allowed := anyMatches(r.may, to) && !anyMatches(exceptions[name], to)
				if !allowed && (!test || !anyMatches(r.tests, to)) {
					what := "imports"
					if test {
						what = "imports in its tests"
					}
					bad = append(bad, fmt.Sprintf("%s %s %s", name, what, to))
				}
			}
		}
		check(p.Imports, false)
		check(p.TestImports, true)
		check(p.XTestImports, true)
	}
	return bad
}

func goList(t *testing.T, args ...string) io.Reader {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("missing capability: go")
	}
	// -e: a package that another's error keeps from building has imports all the same.
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list", "-e", "-tags=host,vm"}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v: %s", cmd.Args, err, stderr.String())
	}
	return strings.NewReader(string(out))
}

func packages(t *testing.T) []pkg {
	t.Helper()
	d := json.NewDecoder(goList(t, "-json=ImportPath,Name,Doc,Imports,TestImports,XTestImports", "./..."))
	var all []pkg
	for {
		var p pkg
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if len(all) < 20 {
		t.Fatalf("go list names %d packages only", len(all))
	}
	return all
}

func TestImports(t *testing.T) {
	for _, v := range violations(packages(t)) {
		t.Error(v)
	}
}

// TestForbiddenImportsAreFound: the rules do forbid what they are there for.
func TestForbiddenImportsAreFound(t *testing.T) {
	tests := []struct {
		from, to string
		test     bool
		ok       bool
	}{
		{"internal/storage/qcow2", "internal/domain", false, true},
		{"internal/storage/qcow2", "internal/config", false, false},
		{"internal/storage/qcow2", "internal/storage", false, false},
		{"internal/storage/qcow2", "internal/storage/storagetest", true, true},
		{"internal/storage/zfs", "internal/storage/qcow2", false, false},
		{"internal/storage/zfs", "internal/storage/qcow2", true, false},
		{"internal/network/usernet", "internal/qemu", false, false},
		{"internal/qemu", "internal/qemu/qmp", false, true},
		{"internal/qemu", "internal/link", false, false},
		{"internal/link", "internal/guest/port", false, false},
		{"internal/link", "internal/guest/port", true, true},
		{"internal/state", "internal/workspace", false, false},
		{"internal/workspace", "internal/qemu", false, false},
		{"internal/workspace", "internal/storage/qcow2", true, false},
		{"internal/workspace", "internal/workspace", true, true}, // its external tests
		{"internal/domain", "internal/fault", false, false},
		{"internal/server", "internal/workspace", false, true},
		{"internal/server", "internal/state", false, false},
		{"internal/server", "internal/mcp", false, false},
		{"internal/guest/proc", "internal/fault", false, false},
		{"internal/guest/proc", "internal/link/wire", false, true},
		{"internal/guest/proc", "internal/link", false, false},
		{"cmd/agentiso-guest", "internal/domain", false, false},
		{"cmd/agentiso", "internal/qemu", false, true},
		{"cmd/agentiso", "internal/guest/boot", false, false},
		{"client", "internal/workspace", false, false},
		{"internal/brandnew", "internal/domain", false, false},
	}
	for _, tt := range tests {
		p := pkg{ImportPath: module + "/" + tt.from}
		if tt.test {
			p.XTestImports = []string{"testing", module + "/" + tt.to}
		} else {
			p.Imports = []string{"fmt", module + "/" + tt.to}
		}
		if got := violations([]pkg{p}); (len(got) == 0) != tt.ok {
			t.Errorf("%s importing %s (test: %v): %v", tt.from, tt.to, tt.test, got)
		}
	}
}

// heavy must not get into the agent, which is in the memory of every guest.
var heavy = []string{
	"modernc.org/", "github.com/prometheus/", "go.opentelemetry.io/", "github.com/spf13/", "github.com/BurntSushi/",
	"github.com/google/go-containerregistry", "github.com/klauspost/compress", "github.com/ulikunitz/xz", "database/sql", "html/template",
}

func TestAgentStaysLight(t *testing.T) {
	lines := bufio.NewScanner(goList(t, "-deps", "./cmd/agentiso-guest"))
	for lines.Scan() {
		for _, h := range heavy {
			if strings.HasPrefix(lines.Text(), h) {
				t.Errorf("cmd/agentiso-guest depends on %s; see go mod why, or go list -deps", lines.Text())
			}
		}
	}
}

// TestPackageNames: a package is named for what it provides and says so.
func TestPackageNames(t *testing.T) {
	for _, p := range packages(t) {
		switch path.Base(p.ImportPath) {
		case "util", "utils", "common", "helper", "helpers", "misc", "types", "manager", "base", "shared":
			t.Errorf("%s: the name says nothing", p.ImportPath)
		}
		generated := strings.HasPrefix(p.ImportPath, module+"/api/")
		if p.Doc == "" && !generated && p.ImportPath != module {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
	}
}

const maxLines = 600

var generated = regexp.MustCompile(`(?m)^// Code generated .* DO NOT EDIT\.$`)

func TestFileSizes(t *testing.T) {
	err := filepath.WalkDir(".", func(name string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && name != "." && (strings.HasPrefix(e.Name(), ".") || slices.Contains([]string{"bin", "dist", "testdata"}, e.Name())):
			return fs.SkipDir
		case e.IsDir() || filepath.Ext(name) != ".go":
			return nil
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if n := strings.Count(string(b), "\n"); n > maxLines && !generated.Match(b) {
			t.Errorf("%s has %d lines: split it by subject (at most %d)", name, n, maxLines)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
