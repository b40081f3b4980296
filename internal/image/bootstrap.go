package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/cmdrun"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

const (
	bootstrapper = "mmdebstrap"
	// probeLimit bounds questions to the host's tools.
	probeLimit = 20 * time.Second
	// bootstrapLimit bounds one bootstrap; dev-full takes some minutes over a
	// slow line.
	bootstrapLimit = time.Hour
	// termGrace is how long a cancelled bootstrap has to clear up its root.
	termGrace = 15 * time.Second
)

// bootstrapVersion asks for the bootstrapper, and finds out that it is missing.
func bootstrapVersion(ctx context.Context) (string, error) {
	if _, err := exec.LookPath(bootstrapper); err != nil {
		return "", fault.New(fault.Missing, "%s is not installed: %w", bootstrapper, err).
			WithNext("Install it: sudo apt-get install mmdebstrap")
	}
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	out, err := cmdrun.Host(ctx, bootstrapper, "--version")
	if err != nil {
		return "", fmt.Errorf("ask for the version of %s: %w", bootstrapper, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// bootstrapMode finds the way in which this user can make a root: as root; in
// a user namespace with subordinate ids; or with fakechroot.
func bootstrapMode(ctx context.Context, uid int) (string, error) {
	if uid == 0 {
		return "root", nil
	}
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	_, unshareErr := cmdrun.Host(ctx, bootstrapper, "--unshare-helper", "true")
	if unshareErr == nil {
		return "unshare", nil
	}
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	for _, tool := range []string{"fakechroot", "fakeroot"} {
		if _, err := exec.LookPath(tool); err != nil {
			return "", fault.New(fault.Missing, "an ordinary user cannot build this image here: user namespaces with subordinate ids do not work (%w), and %s is not installed", unshareErr, tool).
				WithNext("Install one of the two ways: sudo apt-get install uidmap (and give the user a range in /etc/subuid and /etc/subgid), or sudo apt-get install fakechroot fakeroot")
		}
	}
	return "fakechroot", nil
}

// bootstrapArgs is the command line that writes the tar of a root to standard
// output and reads the apt sources from standard input.
func bootstrapArgs(r recipe, d distro, mode string) []string {
	argv := []string{
		bootstrapper, "--verbose", "--mode=" + mode, "--variant=minbase", "--format=tar",
		"--include=" + strings.Join(r.packages(d), ","),
		`--aptopt=Acquire::Retries "3"`,
	}
	if !r.Docs {
		for _, opt := range []string{
			"path-exclude=/usr/share/man/*", "path-exclude=/usr/share/info/*", "path-exclude=/usr/share/doc/*",
			"path-include=/usr/share/doc/*/copyright", "path-exclude=/usr/share/locale/*", "path-include=/usr/share/locale/locale.alias",
		} {
			argv = append(argv, "--dpkgopt="+opt)
		}
	}
	if r.Config.User == userConfig.User {
		argv = append(argv, `--customize-hook=chroot "$1" useradd --create-home --uid 1000 --user-group --shell /bin/bash user`)
	}
	return append(argv, d.Codename, "-", "-")
}

// buildDistro bootstraps the host's distribution into the stage.
func (s *Store) buildDistro(ctx context.Context, st *stage, r recipe, d distro, p domain.ProgressFunc) error {
	sources, err := hostSources("/", d)
	if err != nil {
		return err
	}
	mode, err := bootstrapMode(ctx, os.Geteuid())
	if err != nil {
		return err
	}
	var list strings.Builder
	for _, a := range sources {
		fmt.Fprintln(&list, a.line())
	}
	tmp, remove, err := bootstrapDir(st.dir, mode)
	if err != nil {
		return err
	}
	u := s.unpacker(st, "writing the disk", p)
	u.extras = r.Extras
	log := &bootstrapLog{progress: p}
	err = runBootstrap(ctx, bootstrapArgs(r, d, mode), tmp, strings.NewReader(list.String()), log, func(tar io.Reader) error {
		return u.apply(ctx, tar, false)
	})
	if err == nil {
		for _, name := range r.extras() {
			if _, serr := os.Stat(filepath.Join(st.dir, name)); serr != nil {
				err = fmt.Errorf("the recipe's disk has no file that would be %s", name)
			}
		}
	}
	return errors.Join(err, remove())
}

// bootstrapDir makes the directory for the unpacked root. In a user namespace
// the stage will not do: its parents may be closed to the namespace's users.
func bootstrapDir(stage, mode string) (dir string, remove func() error, err error) {
	if mode != "unshare" {
		dir = filepath.Join(stage, "root")
		return dir, func() error { return removeTree(dir) }, os.Mkdir(dir, 0o755)
	}
	dir, err = os.MkdirTemp("/var/tmp", "agentiso-bootstrap-")
	if err != nil {
		return "", nil, err
	}
	remove = func() error {
		if os.RemoveAll(dir) == nil {
			return nil
		}
		// What is left belongs to subordinate ids.
		ctx, cancel := context.WithTimeout(context.Background(), probeLimit)
		defer cancel()
		if _, err := cmdrun.Host(ctx, bootstrapper, "--unshare-helper", "find", dir, "-mindepth", "1", "-delete"); err != nil {
			return fmt.Errorf("remove %s: %w", dir, err)
		}
		return os.RemoveAll(dir)
	}
	return dir, remove, os.Chmod(dir, 0o755)
}

// runBootstrap runs argv with consume on its standard output. When ctx ends,
// or consume fails, the process gets SIGTERM and time to clear up; then its
// whole group gets SIGKILL. All of it is gone when runBootstrap returns.
func runBootstrap(ctx context.Context, argv []string, tmp string, stdin io.Reader, log *bootstrapLog, consume func(io.Reader) error) error {
	ctx, cancel := context.WithTimeout(ctx, bootstrapLimit)
	defer cancel()
	cmd := exec.Command(argv[0], argv[1:]...) //nolint:noctx // ended below, gently first
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TMPDIR="+tmp)
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stderr = stdin, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 2 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", argv[0], err)
	}
	group := cmd.Process.Pid
	run, stop := context.WithCancel(ctx)
	defer stop()
	exited, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-exited:
			return
		case <-run.Done():
		}
		signalGroup(group, syscall.SIGTERM)
		t := time.NewTimer(termGrace)
		defer t.Stop()
		select {
		case <-exited:
		case <-t.C:
			signalGroup(group, syscall.SIGKILL)
			out.Close() // whoever else holds its other end
		}
	}()
	consumeErr := consume(out)
	if consumeErr != nil && !brokenOff(consumeErr) {
		stop()
		_, _ = io.Copy(io.Discard, out) // let it write on until it ends
	}
	// The group is signalled only while its leader's number cannot be anybody
	// else's: until Wait has reaped it.
	for errors.Is(unix.Waitid(unix.P_PID, group, nil, unix.WEXITED|unix.WNOWAIT, nil), unix.EINTR) {
		continue
	}
	close(exited)
	<-ended
	signalGroup(group, syscall.SIGKILL) // what outlives its leader
	return bootstrapFault(cmd.Wait(), consumeErr, ctx.Err(), log.cause())
}

func signalGroup(pid int, sig syscall.Signal) {
	_ = syscall.Kill(-pid, sig) // gone already is what is wanted
}

// brokenOff reports that the tar ended early, which is for the writer's exit
// status to explain.
func brokenOff(err error) bool {
	return errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, errEmpty)
}

// bootstrapFault tells whose failure it was: the caller's who gave up, the
// disk's that could not be written, or the bootstrapper's.
func bootstrapFault(waitErr, consumeErr, ctxErr error, cause string) error {
	switch {
	case ctxErr != nil:
		return ctxErr
	case consumeErr != nil && (waitErr == nil || !brokenOff(consumeErr)):
		return consumeErr
	case waitErr == nil:
		return nil
	}
	contains := func(words ...string) bool {
		for _, w := range words {
			if strings.Contains(cause, w) {
				return true
			}
		}
		return false
	}
	switch {
	case contains("No space left"):
		return fmt.Errorf("%s: %s: %w", bootstrapper, cause, syscall.ENOSPC)
	case contains("Could not resolve", "Failed to fetch", "Temporary failure", "Unable to connect", "Could not connect", "Connection failed"):
		return fault.New(fault.Unavailable, "%s could not fetch packages: %s", bootstrapper, cause).
			WithNext("Check the network, and that `apt-get update` works on the host: its archives are used.")
	case contains("Unable to locate package", "has no installation candidate"):
		return fault.New(fault.Unsupported, "the host's archives lack a package of the recipe: %s", cause).
			WithNext("Check the components of the host's apt sources (on Ubuntu, universe is needed), or pull an image instead.")
	}
	return fault.New(fault.Internal, "%s failed: %w: %s", bootstrapper, waitErr, cause).
		WithNext("The lines above are its own; the progress log has all of them.")
}
