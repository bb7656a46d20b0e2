{{/* The beginning of every name. */}}
{{- define "paceline.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains "paceline" .Release.Name -}}
{{- .Release.Name | trunc 30 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-paceline" (.Release.Name | trunc 21 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{/* What selects the pods of one part; they have no other labels, so that a release of the chart that changes nothing
     about them leaves them alone. Given: root, part. */}}
{{- define "paceline.selector" -}}
app.kubernetes.io/name: paceline
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end -}}

{{/* Labels of everything that belongs to one part. Given: root, part. */}}
{{- define "paceline.labels" -}}
{{ include "paceline.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* What selects the executors on one type of node. Given: root, nodeType. */}}
{{- define "paceline.executorSelector" -}}
{{ include "paceline.selector" (dict "root" .root "part" "executor") }}
paceline/node-type: {{ .nodeType.name }}
{{- end -}}

{{- define "paceline.executorLabels" -}}
{{ include "paceline.labels" (dict "root" .root "part" "executor") }}
paceline/node-type: {{ .nodeType.name }}
{{- end -}}

{{- define "paceline.executorName" -}}
{{ include "paceline.fullname" .root }}-executor-{{ .nodeType.name }}
{{- end -}}

{{- define "paceline.schedulerAddress" -}}
{{ include "paceline.fullname" . }}-scheduler:50051
{{- end -}}

{{/* Given: root, image. */}}
{{- define "paceline.image" -}}
image: {{ printf "%s:%s" .image.repository (.image.tag | default .root.Chart.AppVersion) | quote }}
imagePullPolicy: {{ .root.Values.images.pullPolicy }}
{{- end -}}

{{/* What the pods of all parts have alike. Without service links: those set variables such as PACELINE_SCHEDULER_PORT,
     among which flags look for their values. */}}
{{- define "paceline.pod" -}}
enableServiceLinks: false
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "paceline.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{/* Seconds from the order to stop until the kill. */}}
{{- define "paceline.schedulerGrace" -}}
{{- if .Values.scheduler.journal.enabled -}}30{{- else -}}{{ add .Values.scheduler.drainTimeout 30 }}{{- end -}}
{{- end -}}

{{/* The hook takes the drain time-out and ten seconds; where it failed, the process takes the drain time-out again. */}}
{{- define "paceline.executorGrace" -}}
{{ add (mul 2 .Values.executors.drainTimeout) 30 }}
{{- end -}}

{{/* The scaling file: what the chart knows, and over it what the values say. */}}
{{- define "paceline.scaling" -}}
{{- $root := . -}}
{{- $types := list -}}
{{- $deployments := dict -}}
{{- range .Values.executors.nodeTypes -}}
{{- $type := dict "name" .name "price_per_hour" (.pricePerHour | default 0) "capacity" (.capacity | default 1) -}}
{{- if not (kindIs "invalid" .maxReplicas) -}}
{{- $_ := set $type "max" .maxReplicas -}}
{{- end -}}
{{- $types = append $types $type -}}
{{- $_ := set $deployments .name (include "paceline.executorName" (dict "root" $root "nodeType" .)) -}}
{{- end -}}
{{- $scaling := dict "node_types" $types "times" (dict "finish" (printf "%ds" (int .Values.executors.drainTimeout))) -}}
{{- if eq .Values.autoscaling.kind "keda" -}}
{{- $_ := set $scaling "actuator" (dict "kind" "keda") -}}
{{- $_ := set $scaling "keda" (dict "listen" "0.0.0.0:50071") -}}
{{- else -}}
{{- $_ := set $scaling "actuator" (dict "kind" "kubernetes" "namespace" .Release.Namespace "deployments" $deployments) -}}
{{- end -}}
{{- mergeOverwrite $scaling (deepCopy .Values.autoscaling.config) | toYaml -}}
{{- end -}}
