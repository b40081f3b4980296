package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/agentiso/agentiso/internal/cmdrun"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// host is what of the machine a fetch or build uses; tests put another there.
type host struct {
	root string // of /etc/os-release and /etc/apt
	run  func(ctx context.Context, c cmdrun.Command) error
	look func(program string) error
}

func realHost() host {
	return host{
		root: "/",
		run:  cmdrun.Stream,
		look: func(program string) error { _, err := exec.LookPath(program); return err },
	}
}

// release is what /etc/os-release says.
type release struct {
	id, like, codename string
}

func (h host) release() (release, error) {
	text, err := os.ReadFile(filepath.Join(h.root, "etc/os-release"))
	if err != nil {
		return release{}, fmt.Errorf("find out the distribution: %w", err)
	}
	var r release
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		value = strings.Trim(value, `"'`)
		switch key {
		case "ID":
			r.id = value
		case "ID_LIKE":
			r.like = value
		case "VERSION_CODENAME":
			r.codename = value
		}
	}
	return r, nil
}

// family is debian or ubuntu; "" for neither.
func (r release) family() string {
	for _, id := range append([]string{r.id}, strings.Fields(r.like)...) {
		if id == "debian" || id == "ubuntu" {
			return id
		}
	}
	return ""
}

// apt is a package manager of our own over the host's archive: its lists and
// downloads are private, so it needs no root, disturbs nothing, and does not
// depend on when somebody last ran apt-get update. The host's configuration of
// proxies, transports and keys stays in force.
type apt struct {
	h   host
	dir string
}

// newApt makes the private state in dir for the given sources.
func (h host) newApt(dir string, sources []aptSource) (*apt, error) {
	a := &apt{h, dir}
	for _, d := range []string{"lists/partial", "cache/archives/partial", "packages"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, fmt.Errorf("make private apt state: %w", err)
		}
	}
	files := map[string]string{
		"private.sources": formatSources(sources),
		"status":          "", // of dpkg: nothing is installed
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return nil, fmt.Errorf("make private apt state: %w", err)
		}
	}
	return a, nil
}

// argv is an apt command line. Options given here come after every file of the
// host's configuration.
func (a *apt) argv(program string, args ...string) []string {
	p := func(name string) string { return filepath.Join(a.dir, name) }
	argv := []string{program}
	for _, o := range []string{
		"Dir::Etc::SourceList=" + p("private.sources"),
		"Dir::Etc::SourceParts=/dev/null",
		"Dir::Etc::Preferences=/dev/null",
		"Dir::Etc::PreferencesParts=/dev/null",
		"Dir::State=" + a.dir,
		"Dir::State::Lists=" + p("lists"),
		"Dir::State::Status=" + p("status"),
		"Dir::Cache=" + p("cache"),
		"Dir::Cache::Archives=" + p("cache/archives"),
		"Acquire::Languages=none",
		"Acquire::Retries=3",
		"APT::Status-Fd=1", // progress in a form for programs
		"APT::Update::Error-Mode=any",
		"APT::Architecture=amd64",
	} {
		argv = append(argv, "-o", o)
	}
	return append(argv, args...)
}

// update fetches the package lists.
func (a *apt) update(ctx context.Context, p domain.ProgressFunc) error {
	p.Report(domain.Progress{Stage: "fetch package lists"})
	w := &lines{each: func(l string) { reportApt(p, "fetch package lists", l, 0) }}
	err := a.h.run(ctx, cmdrun.Command{Argv: a.argv("apt-get", "-q", "update"), Stdout: w})
	if err != nil {
		return aptFault(ctx, "fetch package lists", err)
	}
	return nil
}

// debPackage is what the lists say of a package's newest version.
type debPackage struct {
	name, version, depends string
	sizeBytes              int64
}

// show finds a package; ok is false when the archive has none of that name.
func (a *apt) show(ctx context.Context, name string) (pkg debPackage, ok bool, err error) {
	var out bytes.Buffer
	err = a.h.run(ctx, cmdrun.Command{Argv: a.argv("apt-cache", "--no-all-versions", "show", name), Stdout: &out})
	if err != nil {
		if e, ok := errors.AsType[*cmdrun.Error](err); ok && ctx.Err() == nil && strings.Contains(e.Stderr, "No packages found") {
			return debPackage{}, false, nil
		}
		return debPackage{}, false, aptFault(ctx, "look up package "+name, err)
	}
	st := parseStanzas(out.String())
	if len(st) == 0 || st[0]["version"] == "" {
		return debPackage{}, false, nil
	}
	pkg = debPackage{name: name, version: st[0]["version"], depends: st[0]["depends"]}
	pkg.sizeBytes, _ = strconv.ParseInt(st[0]["size"], 10, 64) // for progress only
	return pkg, true, nil
}

// download fetches one package, verified by apt against the signed lists, and
// returns the file. One that is there already is not fetched again.
func (a *apt) download(ctx context.Context, pkg debPackage, p domain.ProgressFunc) (string, error) {
	stage := "download " + pkg.name
	p.Report(domain.Progress{Stage: stage, Total: pkg.sizeBytes, Unit: "bytes"})
	dir := filepath.Join(a.dir, "packages")
	w := &lines{each: func(l string) { reportApt(p, stage, l, pkg.sizeBytes) }}
	err := a.h.run(ctx, cmdrun.Command{
		Argv: a.argv("apt-get", "-q", "download", pkg.name+"="+pkg.version), Dir: dir, Stdout: w,
	})
	if err != nil {
		return "", aptFault(ctx, stage, err)
	}
	// A version's colon is %3a in the file's name.
	found, err := filepath.Glob(filepath.Join(dir, pkg.name+"_*.deb"))
	if err != nil {
		return "", err
	}
	want := pkg.name + "_" + strings.ReplaceAll(pkg.version, ":", "%3a") + "_"
	for _, f := range found {
		if strings.HasPrefix(filepath.Base(f), want) {
			return f, nil
		}
	}
	return "", fmt.Errorf("%s: apt-get left no file %s*.deb", stage, want)
}

// clean removes the package lists and what of the downloads is of no further
// use: 30 MB of lists, and packages that are in the store by now.
func (a *apt) clean() error {
	return errors.Join(
		os.RemoveAll(filepath.Join(a.dir, "lists")),
		os.RemoveAll(filepath.Join(a.dir, "cache")),
		os.RemoveAll(filepath.Join(a.dir, "packages")))
}

// statusRE is a line of APT::Status-Fd: "dlstatus:1:42.5:Retrieving file 1 of 1".
var statusRE = regexp.MustCompile(`^dlstatus:\d+:([0-9.]+):`)

// reportApt turns a line of apt's output into progress.
func reportApt(p domain.ProgressFunc, stage, line string, total int64) {
	if m := statusRE.FindStringSubmatch(line); m != nil {
		pct, err := strconv.ParseFloat(m[1], 64)
		if err == nil && total > 0 {
			p.Report(domain.Progress{Stage: stage, Done: int64(pct / 100 * float64(total)), Total: total, Unit: "bytes"})
		}
		return
	}
	if line != "" && !strings.HasPrefix(line, "pmstatus:") {
		p.Report(domain.Progress{Stage: stage, Log: line})
	}
}

// aptFault says what a failed apt command means to the user.
func aptFault(ctx context.Context, what string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", what, ctx.Err())
	}
	var e *cmdrun.Error
	msg := err.Error()
	if errors.As(err, &e) {
		msg = e.Stderr
		if errors.Is(e.Err, exec.ErrNotFound) {
			return missingTools([]string{"apt"})
		}
	}
	if strings.Contains(msg, "No space left") || strings.Contains(msg, "enough free space") {
		return fault.New(fault.NoSpace, "%s: the disk is full: %w", what, err).
			WithNext("Free some space where the data directory is.")
	}
	return fault.New(fault.Unavailable, "%s: %w", what, err).
		WithNext("Check that `apt-get update` works on this host, then try again.")
}

// missingTools names what to install.
func missingTools(packages []string) error {
	return fault.New(fault.Missing, "programs are missing that belong to: %s", strings.Join(packages, " ")).
		WithNext("Run `sudo apt-get install %s`.", strings.Join(packages, " "))
}

// lines splits what is written to it into lines. A line longer than maxLine is
// cut.
type lines struct {
	each func(string)
	buf  []byte
}

const maxLine = 4 << 10

func (l *lines) Write(p []byte) (int, error) {
	for _, c := range p {
		switch {
		case c == '\n' || c == '\r':
			l.each(string(l.buf))
			l.buf = l.buf[:0]
		case len(l.buf) < maxLine:
			l.buf = append(l.buf, c)
		}
	}
	return len(p), nil
}
