// Command testtiers runs the test tiers one after another and says at the end
// what each ran and skipped.
//
//	unit   no root, no VM, seconds
//	host   root: namespaces, loop mounts, other users   (build tag host)
//	vm     real guests                                  (build tag vm)
//
// A tier that this host cannot run is skipped with its reason, unless
// AGENTISO_REQUIRE_TIERS names it: then a skip is a failure, as is any single
// test in it that skips for want of a capability, except those that
// AGENTISO_MAY_SKIP names.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

type tier struct {
	name    string
	tag     string
	timeout time.Duration
	missing func() string // why this host cannot run it; "" if it can
	prepare func() error
}

// result counts one tier's tests; subtests count too.
type result struct {
	tier                    string
	passed, failed, skipped int
	capabilities            []string // tests skipped for want of a capability
	allowed                 []string // those of them that may
	refused                 string   // why the tier did not run at all
	took                    time.Duration
}

func main() {
	names := flag.String("tiers", "unit,host,vm", "tiers to run, comma-separated")
	run := flag.String("run", "", "only tests that match, as in go test -run")
	flag.Parse()
	os.Exit(runTiers(strings.Split(*names, ","), *run))
}

func runTiers(names []string, pattern string) int {
	required := strings.Split(os.Getenv("AGENTISO_REQUIRE_TIERS"), ",")
	tiers := []tier{
		{name: "unit", timeout: 10 * time.Minute},
		{name: "host", tag: "host", timeout: 15 * time.Minute, missing: needRoot},
		{name: "vm", tag: "vm", timeout: 45 * time.Minute, missing: needQEMU, prepare: prepareVM},
	}
	code := 0
	var results []result
	for _, t := range tiers {
		if !slices.Contains(names, t.name) {
			continue
		}
		r := runTier(t, pattern)
		if r.failed > 0 || (slices.Contains(required, t.name) && (r.refused != "" || len(r.capabilities) > 0)) {
			code = 1
		}
		results = append(results, r)
	}
	fmt.Println("\n== tiers")
	for _, r := range results {
		for _, c := range r.capabilities {
			fmt.Printf("%s skipped %s\n", r.tier, c)
		}
		for _, c := range r.allowed {
			fmt.Printf("%s skipped, as it may, %s\n", r.tier, c)
		}
		if r.refused != "" {
			fmt.Printf("%s did not run: %s\n", r.tier, r.refused)
			continue
		}
		fmt.Printf("%s took %v\n", r.tier, r.took.Round(time.Second))
		fmt.Printf("%s: %d passed, %d failed, %d skipped\n", r.tier, r.passed, r.failed, r.skipped)
	}
	if code != 0 {
		fmt.Println("FAIL")
	}
	return code
}

func needRoot() string {
	if os.Geteuid() != 0 {
		return "it needs root"
	}
	return ""
}

func needQEMU() string {
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		return "qemu-system-x86_64 is not installed"
	}
	return ""
}

func runTier(t tier, pattern string) (r result) {
	r.tier = t.name
	fmt.Printf("\n== tier %s\n", t.name)
	if t.missing != nil {
		if r.refused = t.missing(); r.refused != "" {
			return r
		}
	}
	began := time.Now()
	defer func() { r.took = time.Since(began) }()
	if t.prepare != nil {
		if err := t.prepare(); err != nil {
			fmt.Printf("prepare tier %s: %v\n", t.name, err)
			r.failed++
			return r
		}
	}
	runs := []run{{packages: "./...", pattern: pattern}}
	if t.tag != "" {
		var err error
		if runs, err = tagged(t.tag, pattern); err != nil {
			fmt.Printf("list tests of tier %s: %v\n", t.name, err)
			r.failed++
			return r
		}
	}
	for _, one := range runs {
		r.run(t, one)
	}
	return r
}

// run is one call of go test.
type run struct{ packages, pattern string }

// tagged finds the tests that a build tag adds, by package: the unit tier has
// run the others already. One package at a time, because guests are slow side
// by side.
func tagged(tag, pattern string) ([]run, error) {
	without, err := testFiles()
	if err != nil {
		return nil, err
	}
	with, err := testFiles("-tags", tag)
	if err != nil {
		return nil, err
	}
	var runs []run
	for _, pkg := range slices.Sorted(maps.Keys(with)) {
		var names []string
		for _, file := range with[pkg] {
			if slices.Contains(without[pkg], file) {
				continue
			}
			src, err := os.ReadFile(file)
			if err != nil {
				return nil, err
			}
			for _, m := range testFunc.FindAllStringSubmatch(string(src), -1) {
				names = append(names, m[1])
			}
		}
		if len(names) == 0 {
			continue
		}
		p := "^(" + strings.Join(names, "|") + ")$"
		if pattern != "" {
			p = pattern
		}
		runs = append(runs, run{pkg, p})
	}
	return runs, nil
}

var testFunc = regexp.MustCompile(`(?m)^func (Test\w+)\(`)

// testFiles lists each package's test files.
func testFiles(flags ...string) (map[string][]string, error) {
	args := append([]string{"list"}, flags...)
	out, err := exec.CommandContext(context.Background(), "go", append(args, "-json=ImportPath,Dir,TestGoFiles,XTestGoFiles", "./...")...).Output()
	if err != nil {
		return nil, err
	}
	files := map[string][]string{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct {
			ImportPath, Dir           string
			TestGoFiles, XTestGoFiles []string
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return files, nil
		} else if err != nil {
			return nil, err
		}
		for _, f := range append(p.TestGoFiles, p.XTestGoFiles...) {
			files[p.ImportPath] = append(files[p.ImportPath], filepath.Join(p.Dir, f))
		}
	}
}

// run adds the results of one call of go test to r.
func (r *result) run(t tier, one run) {
	args := []string{"test", "-json", "-timeout", t.timeout.String(), "-tags", t.tag}
	if one.pattern != "" {
		args = append(args, "-run", one.pattern)
	}
	cmd := exec.CommandContext(context.Background(), "go", append(args, one.packages)...)
	cmd.Stderr = os.Stderr
	cmd.Env = append(os.Environ(), "AGENTISO_TEST_BIN="+absolute("bin"))
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Println(err)
		r.failed++
		return
	}
	before := r.failed
	r.read(out)
	if err := cmd.Wait(); err != nil && r.failed == before {
		fmt.Printf("%s: %v\n", one.packages, err) // it did not build, or it panicked
		r.failed++
	}
}

// event is one line of go test -json; see `go doc test2json`.
type event struct {
	Action, Package, Test, Output string
}

// read counts the tests and prints what failed or was skipped, with its output.
func (r *result) read(in io.Reader) {
	output := map[string][]string{}
	sc := bufio.NewScanner(in)
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var e event
		if json.Unmarshal(sc.Bytes(), &e) != nil {
			fmt.Println(sc.Text())
			continue
		}
		key := e.Package + " " + e.Test
		switch e.Action {
		case "output", "build-output":
			if e.Action == "build-output" {
				fmt.Print(e.Output)
			}
			output[key] = append(output[key], e.Output)
		case "pass":
			if e.Test != "" {
				r.passed++
			}
			delete(output, key)
		case "skip":
			if e.Test != "" {
				r.skipped++
				text := strings.Join(output[key], "")
				if i := strings.Index(text, "missing capability:"); i >= 0 {
					line, _, _ := strings.Cut(text[i:], "\n")
					if slices.Contains(strings.Split(os.Getenv("AGENTISO_MAY_SKIP"), ","), e.Test) {
						r.allowed = append(r.allowed, key+": "+line)
					} else {
						r.capabilities = append(r.capabilities, key+": "+line)
					}
				}
			}
			delete(output, key)
		case "fail":
			if e.Test != "" {
				r.failed++
			}
			fmt.Printf("--- FAIL %s\n%s", key, strings.Join(output[key], ""))
			delete(output, key)
		}
	}
}

func absolute(path string) string {
	abs, err := filepath.Abs(path)
	if err != nil {
		return path
	}
	return abs
}
