package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/server/servertest"
)

// cliEnv makes the test binary be the command line.
const cliEnv = "AGENTISO_TEST_CLI"

func init() {
	if os.Getenv(cliEnv) != "" {
		os.Exit(execute(context.Background(), os.Args[1:]))
	}
}

// cli is a command line that talks to d.
func cli(t *testing.T, d *servertest.Daemon, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), cliEnv+"=1", "AGENTISO_SOCKET="+d.Socket, "HOME="+t.TempDir(), "TERM=vt100")
	return cmd
}

func exitCode(err error) int {
	if ee, ok := errors.AsType[*exec.ExitError](err); ok {
		if ws, ok := ee.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return -int(ws.Signal())
		}
		return ee.ExitCode()
	}
	if err != nil {
		return -1000
	}
	return 0
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// start begins a run of a command that ends by itself only when it is killed,
// and returns when that runs.
func startYes(t *testing.T, d *servertest.Daemon, agent *servertest.Agent, args ...string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	cmd := cli(t, d, args...)
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.Discard, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the command runs", func() bool { return agent.Printed.Load() > 0 })
	return cmd, &stderr
}

func fakeDaemon(t *testing.T) (*servertest.Daemon, *servertest.Agent) {
	t.Helper()
	agent := servertest.NewAgent()
	return servertest.Start(t, func() http.Handler { return agent }), agent
}

func TestRunIsInterrupted(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		d, agent := fakeDaemon(t)
		cmd, stderr := startYes(t, d, agent, "run", "--", "yes")
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if code := exitCode(cmd.Wait()); code != 128+int(sig) {
			t.Errorf("%v: exit code %d, %s", sig, code, stderr)
		}
		if n := d.Workspaces.Count(); n != 0 {
			t.Errorf("%v: %d workspaces are left", sig, n)
		}
		if agent.Killed.Load() == 0 {
			t.Errorf("%v: the command was not killed", sig)
		}
	}
}

func TestRunLeavesNothingWhenItIsKilled(t *testing.T) {
	d, agent := fakeDaemon(t)
	cmd, _ := startYes(t, d, agent, "run", "--", "yes")
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	eventually(t, "the workspace is destroyed", func() bool { return d.Workspaces.Count() == 0 })
}

func TestRunWhoseWorkspaceDies(t *testing.T) {
	d, agent := fakeDaemon(t)
	cmd, stderr := startYes(t, d, agent, "run", "--name", "box", "--", "yes")
	d.Workspaces.Crash("box")
	if code := exitCode(cmd.Wait()); code != exitOwnFailure || !strings.Contains(stderr.String(), "next: ") {
		t.Errorf("exit code %d, %s", code, stderr)
	}
	if n := d.Workspaces.Count(); n != 0 {
		t.Errorf("%d workspaces are left", n)
	}
}

func TestRunWhoseDaemonEnds(t *testing.T) {
	d, agent := fakeDaemon(t)
	cmd, stderr := startYes(t, d, agent, "run", "--", "yes")
	d.Stop(t)
	if code := exitCode(cmd.Wait()); code != exitOwnFailure || !strings.Contains(stderr.String(), "agentiso up") {
		t.Errorf("exit code %d, %s", code, stderr)
	}
	if n := d.Workspaces.Count(); n != 0 {
		t.Errorf("%d workspaces are left", n)
	}
}

// A reader that stops, as head does, ends the command inside too.
func TestExecWhoseReaderStops(t *testing.T) {
	d, agent := fakeDaemon(t)
	if code := exitCode(cli(t, d, "create", "--name", "box").Run()); code != 0 {
		t.Fatal(code)
	}
	cmd := cli(t, d, "exec", "box", "yes")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	_ = out.Close()
	if code := exitCode(cmd.Wait()); code != 128+int(syscall.SIGPIPE) {
		t.Errorf("exit code %d", code)
	}
	if agent.Killed.Load() != 1 {
		t.Error("the command runs on")
	}
}

// A terminal is raw while a command has it, follows its size, and is as it was
// when the command ends, however it does.
func TestTerminal(t *testing.T) {
	for name, end := range map[string]func(*testing.T, *exec.Cmd, *servertest.Daemon){
		"terminated": func(t *testing.T, cmd *exec.Cmd, _ *servertest.Daemon) {
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		},
		"machine dies": func(_ *testing.T, _ *exec.Cmd, d *servertest.Daemon) { d.Workspaces.Crash("box") },
	} {
		t.Run(name, func(t *testing.T) {
			d, _ := fakeDaemon(t)
			cmd := cli(t, d, "run", "--name", "box", "-it", "--", "size")
			master, slave, err := pty.Open()
			if err != nil {
				t.Skip("missing capability: pseudo-terminals: ", err)
			}
			defer master.Close()
			defer slave.Close()
			if err := pty.Setsize(master, &pty.Winsize{Rows: 33, Cols: 101}); err != nil {
				t.Fatal(err)
			}
			before, err := term.GetState(int(slave.Fd()))
			if err != nil {
				t.Fatal(err)
			}
			cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
			cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			seen := make(chan string, 64)
			go func() { // ends with the master
				buf := make([]byte, 4096)
				for {
					n, err := master.Read(buf)
					if n > 0 {
						seen <- string(buf[:n])
					}
					if err != nil {
						close(seen)
						return
					}
				}
			}()
			var all string
			until := func(want string) {
				t.Helper()
				deadline := time.After(20 * time.Second)
				for !strings.Contains(all, want) {
					select {
					case s := <-seen:
						all += s
					case <-deadline:
						t.Fatalf("never saw %q in %q", want, all)
					}
				}
			}
			until("101x33")
			if now, err := term.GetState(int(slave.Fd())); err != nil || *now == *before {
				t.Errorf("the terminal is not raw (%v)", err)
			}
			if err := pty.Setsize(master, &pty.Winsize{Rows: 50, Cols: 120}); err != nil {
				t.Fatal(err)
			}
			until("120x50")
			end(t, cmd, d)
			code := exitCode(cmd.Wait())
			if want := map[string]int{"terminated": 143, "machine dies": exitOwnFailure}[name]; code != want {
				t.Errorf("exit code %d, not %d: %q", code, want, all)
			}
			if after, err := term.GetState(int(slave.Fd())); err != nil || *after != *before {
				t.Errorf("the terminal is not as it was (%v)", err)
			}
			if n := d.Workspaces.Count(); n != 0 {
				t.Errorf("%d workspaces are left", n)
			}
		})
	}
}

// On a terminal a wait shows; its line is taken away in the end.
func TestProgressOnATerminal(t *testing.T) {
	d, _ := fakeDaemon(t)
	d.Images.Gate = make(chan struct{})
	cmd := cli(t, d, "image", "build", "minimal")
	master, slave, err := pty.Open()
	if err != nil {
		t.Skip("missing capability: pseudo-terminals: ", err)
	}
	defer master.Close()
	if err := pty.Setsize(master, &pty.Winsize{Rows: 24, Cols: 100}); err != nil {
		t.Fatal(err)
	}
	var stdout bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, slave
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = slave.Close()
	var all strings.Builder
	buf := make([]byte, 4096)
	for !strings.Contains(all.String(), "building minimal: unpack") {
		n, err := master.Read(buf)
		if err != nil {
			t.Fatalf("%v after %q", err, all.String())
		}
		all.Write(buf[:n])
	}
	close(d.Images.Gate)
	rest, _ := io.ReadAll(master) // EIO when the last has closed it
	all.Write(rest)
	if code := exitCode(cmd.Wait()); code != 0 || stdout.String() != "minimal\n" {
		t.Errorf("exit code %d, %q", code, stdout.String())
	}
	if !strings.HasSuffix(all.String(), "\r\x1b[K") {
		t.Errorf("the line is still there: %q", all.String())
	}
}

func TestPullTakesCredentialsFromDocker(t *testing.T) {
	d, _ := fakeDaemon(t)
	dir := t.TempDir()
	// "u:p" in base64.
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"auths":{"localhost:5000":{"auth":"dTpw"}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := cli(t, d, "image", "pull", "localhost:5000/x:1")
	cmd.Env = append(cmd.Env, "DOCKER_CONFIG="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if a := d.Images.PullAuth; a.Username != "u" || a.Password != "p" {
		t.Errorf("%+v", a)
	}
}

// Every command says what it does and shows how.
func TestEveryCommandHasHelp(t *testing.T) {
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Short == "" {
			t.Errorf("%s: no short help", c.CommandPath())
		}
		if c.Runnable() && !c.HasSubCommands() && c.Example == "" {
			t.Errorf("%s: no example", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk((&app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr}).newRoot())
}

// The exit codes in the help are those of the table.
func TestExitCodeHelpIsTrue(t *testing.T) {
	for kind, words := range map[fault.Kind]string{
		fault.Internal: "internal error", fault.Invalid: "is wrong", fault.NotFound: "no such", fault.Ambiguous: "ambiguous",
		fault.NameTaken: "name taken", fault.WrongState: "wrong state", fault.InUse: "in use", fault.Limit: "over a limit",
		fault.NoSpace: "disk is full", fault.Unavailable: "does not answer", fault.Missing: "lacks", fault.Unsupported: "cannot do it",
		fault.Timeout: "longer than allowed", fault.BootFailed: "did not boot", fault.Unauthorized: "not allowed", fault.Canceled: "interrupted",
	} {
		found := false
		for line := range strings.Lines(exitCodesHelp) {
			f := strings.Fields(line)
			if len(f) > 1 && f[0] == itoa(kind.Codes().Exit) {
				found = found || strings.Contains(line, words)
			}
		}
		if !found {
			t.Errorf("the help has no line %d with %q", kind.Codes().Exit, words)
		}
		if !strings.Contains(jsonHelp, string(kind)) {
			t.Errorf("the help does not name the kind %s", kind)
		}
	}
}
